"""Which facts may stand in every prompt: what the user says of himself and his own, and not of the moment.

A claim may, and a statement in the first person that neither refers back ("It still fails") nor is about the
moment ("My test is red again today"), nor for the assistant ("I'd like a table"), supposed or quoted. First persons
are told by words, of the languages listed here; a statement in any other language may not stand. What may not is a
remark, recalled for a question.
"""

from __future__ import annotations

import regex

from memos_vllm.memory import claims

_FIRST_PERSON = regex.compile(
    r"""
    \b(?: i | i'?(?:m|ve) | i'(?:d|ll) | my|mine|myself|me|we|we'(?:re|ve|d|ll)|our|ours
      | ich|mein(?:e|er|es|em|en)?|wir|unser(?:e|er|es|em|en)?
      | je|j'\p{L}+|mon|ma|mes|nous|notre|nos
      | yo|mis?|soy|estoy|tengo|vivo|trabajo|somos|tenemos|nuestr[oa]s?
      | mio|mia|miei|mie|sono|abito|lavoro|siamo|nostr[oaie]|ho\ (?:un|una|uno|due|tre|il|la|i|le|\d+)
      | eu|meus?|minhas?|sou|estou|tenho|moro|trabalho|gosto|noss[oa]s?
      | ik|mijn|wij|onze|jag|jeg|mitt|mina|minä|minun|minulla|olen
      | mój|moja|moje|mam|jestem|mieszkam|lubię|benim
      | я|мы|мой|моя|моё|мои|меня|мне|наш(?:а|е|и)?|εγώ|μου|είμαι|έχω|मैं|मुझे|मेरा|मेरी|मेरे|أنا|نحن|عندي|אני|שלי
      )\b
    | [我咱私僕俺] | わたし | ぼく | (?:^|\s)(?:나는|내|제|저는|우리)
    """,
    regex.X,
)
_REFERS_BACK = regex.compile(
    r"(?:(?:and|but|so|now|then|also|well|oh|ok|okay|no|yes|sorry|hm+)[, ]+)*"
    r"(?:it|its|it's|this|that|that's|these|those|they|they're|he|he's|she|she's|same|still|nothing|"
    r"das|dies|ça|cela|c'est|eso|esto|questo|quello|isso|isto)\b"
)
_OF_THE_MOMENT = regex.compile(
    r"""
    \b(?: again|still|right\ now|at\ the\ moment|just\ now|today|tonight|yesterday|tomorrow|so\ far
      | this\ (?:morning|afternoon|evening|time|week)
      | \w*errors?|\w*exceptions?|traceback|fehler(?:meldung)?|erreur|errore|erro
      | heute|gestern|morgen|gerade|immer\ noch|schon\ wieder|aujourd'hui|encore|demain|hoy|ayer|mañana|todavía
      | oggi|ieri|domani|ancora|hoje|ontem|amanhã|ainda )\b
    | 今天|昨天|明天|现在|還是|还是|今日|昨日|明日
    | ^i(?:'m|\ am)\ (?:tired|hungry|thirsty|busy|bored|stuck|confused|sorry|sure|unsure|done|back|ready|lost|getting
      |trying|wondering|about\ to|going\ to)\b
    """,
    regex.X,
)
_HABIT_AGAIN = regex.compile(
    r"(?P<habit>i (?:now )?(?:eat|drink|smoke|play|work|live|drive|study|practi[sc]e)\b[^,;:]*"
    r"|i(?:'m| am) (?:an? )?(?:vegetarian|vegan|pescatarian|sober|single|married|employed|unemployed)) again[.!]*"
)
"""What one does or is from now on; "I get the error again" is of the moment."""

_TO_THE_ASSISTANT = regex.compile(
    r"""
      you(?:'re)? \b (?! (?:\ (?:should|must|may|might|can|need\ to))? \ (?:know|call|remember)\b )
    | as\ an\ (?:ai|assistant)\b
    | i(?:'d|\ would)\ (?:like|love|appreciate)\ (?: to\ (?:know|ask|see|hear|read|understand|get|have|check|discuss)
        | an?|some|more|another|your|if|the|this|that|it )\b
    | i\ (?:just\ |also\ |still\ |really\ )* (?:
          (?:need|want|could\ use)\ (?:some\ |your\ |more\ |a\ (?:bit\ of|little|quick)\ )*
            (?:help|advice|assistance|tips|ideas|suggestions|feedback|input|to\ (?:know|ask|understand))
        | (?:need|want)\ (?:an?|the|some|another|more)\ (?:\p{L}+\ ){0,2}(?:summary|list|table|example|explanation
            |answer|translation|version|script|function|poem|story|essay|outline|draft|overview|paragraph|sentence)s?
        | have\ (?:an?|another|one|two|some|a\ few|several)\ (?:more\ |quick\ |small\ |last\ |other\ )*
            (?:questions?|requests?)
        | (?:do\ not|don't|dont|did\ not|didn't|can't|cannot)\ (?:
              understand (?= [.!]*$ | \ (?:this|that|it|why|how|what|you)\b )
            | get\ (?:it|this|that|what|why)\b | follow(?=[.!]*$) | know(?=[.!]*$) )
        | was\ (?:wondering|asking|hoping) | wonder | asked | meant | said
        | (?:think|believe|guess|mean|see|know)\ (?:that\ )?(?:you|your|you're|this|it|it's|the\ answer) )\b
    | i'?(?:\ a)?m\ (?:just\ )?(?:asking|curious)\b
    """,
    regex.X,
)
_SUPPOSED = regex.compile(r"(?:as )?if\b.*\bi(?:'d| would| could| might)\b", regex.S)
_QUOTATION = regex.compile(r"[\"“«„「『].*[\"”»“」』][.!]?", regex.S)

_OF_WHAT_WAS_SAID = regex.compile(
    r"""
    \b(?:like|love|prefer|enjoy|adore|hate|dislike|detest|stand)\ (?:
        (?:it|this|that|these|those|them|both|neither|what)\b (?!\ (?:when|if|because)\b)
      | the\ (?:(?:first|second|third|last|latter|former|other|previous)\ ?)?(?:one|answer|version|idea|option)?
        (?<!the\ )\b (?= [^\p{L}]*$ | \ (?:better|best|more|most)\b )
      | your\b | option\b | how\ you\b )
    """,
    regex.X,
)


def is_of_what_was_said(preference: str) -> bool:
    """Whether it is about something in the conversation: "I like it", "I prefer the second version"."""
    return _OF_WHAT_WAS_SAID.search(preference.replace("’", "'").lower()) is not None


def may_stand(statement: str) -> bool:
    if claims.claim_of(statement) is not None:
        return True
    plain = statement.strip().replace("’", "'").lower()
    if habit := _HABIT_AGAIN.fullmatch(plain):
        plain = habit["habit"]
    if _REFERS_BACK.match(plain) or _OF_THE_MOMENT.search(plain) or _TO_THE_ASSISTANT.match(plain):
        return False
    if _SUPPOSED.match(plain) or _QUOTATION.fullmatch(plain):
        return False
    return _FIRST_PERSON.search(plain) is not None
