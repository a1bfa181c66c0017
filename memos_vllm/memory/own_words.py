"""What of a message the user says himself, and whether it may be remembered at all.

Material that he hands over is somebody's words, perhaps his own, and tells nothing about him: a text to be
translated or corrected, a quoted line, a transcript of a conversation, a front end's prompt for a task of its own.
"""

from __future__ import annotations

import regex

_TASK_PROMPT = regex.compile(r"\s*#{1,6} task:?[ \t]*\n", regex.I)
"""Of Open WebUI: titles, tags and follow-up questions for the conversation, which the prompt has in it."""

_HEADING = regex.compile(r"^[ \t]*#{1,6}[ \t].*$", regex.M)
_QUOTED_LINE = regex.compile(r"^[ \t]*>.*$", regex.M)
_TRANSCRIPT = regex.compile(r"^[ \t]*(?:\*\*)?(?:assistant|ai|bot|chatgpt)(?:\*\*)?:", regex.I | regex.M)
_SPOKEN_LINE = regex.compile(
    r"^[ \t]*(?:\*\*)?(?:assistant|ai|bot|chatgpt|user|human|system|me|you)(?:\*\*)?:.*$", regex.I | regex.M
)

_POLITE = (
    r"(?: (?:hi|hello|hey|ok|okay|so|now|then|and|please|pls|kindly|just|first) [,\ ]+"
    r" | (?:can|could|would|will)\ you\ | help\ me\ (?:to\ |with\ )? | i\ (?:want|need|would\ like)\ you\ to\ "
    r" | i'd\ like\ you\ to\ )*"
)
_TEXT = (
    r"(?:text|e-?mails?|letter|message|paragraph|sentences?|essay|article|post|tweet|note|cv|resume|bio|abstract|story"
    r"|poem|draft|passage|speech|review|grammar|spelling|punctuation|typos?|wording|english|writing|summary|transcript"
    r"|conversation|dialogue|quote|prompt)"
)
_POLITE_ELSEWHERE = (
    r"(?:bitte|kannst\ du|s'il\ (?:te|vous)\ pla[iî]t|peux-tu|pouvez-vous|por\ favor|per\ favore|puedes|pode|пожалуйста"
    r"|请|請)"
)
_OPERATION_ELSEWHERE = (
    r"(?:übersetz|korrigier|formulier|verbesser)(?:e|en\ sie)?\b|fasse?\ (?=[^:\n]{0,60}zusammen)"
    r"|(?:tradui(?:s|sez|re)|corrige[zr]?|r[ée]sume[zr]?|reformule[zr]?)\b"
    r"|(?:trad[uú]c(?:e|ir)|corrig[ei]r?|res[uú]m[ei]r?|reescrib[ei]r?)\b|(?:traduci|riassumi|correggi|riscrivi)\b"
    r"|(?:traduz(?:a|ir)?|resum(?:a|ir)|corri(?:ja|gir)|reescrev(?:a|er))\b"
    r"|(?:переведи|исправь|перепиши|сократи)(?:те)?\b|翻译|翻譯|润色|潤色|总结|總結|改写"
)
_OPERATION = regex.compile(
    rf"""
    (?: ^[ \t]* (?:[-*\d.)]+[ \t]+)? | (?<=[.!?])\ + ) {_POLITE}
    (?: (?:translate|paraphrase|summari[sz]e|proof-?read|rephrase|re-?write|reword|shorten)\b
        (?!\ (?:what\ you|our|every(?:thing)?|all)\b)
      | (?:fix|correct|improve|edit|check|polish|simplify|review|revise|reply\ to|respond\ to|answer|analy[sz]e|classify
          |continue|complete|expand|format) \b [^:\n]{{0,60}}? \b{_TEXT} )
    [^:\n]{{0,120}} (?: : | [.!?]?[ \t]*\n )
  | ^[ \t]* (?:{_POLITE_ELSEWHERE}[,\ ]*)? (?:{_OPERATION_ELSEWHERE}) [^:：\n]{{0,60}} (?: [:：] | [.!?。？]?[ \t]*\n )
    """,
    regex.I | regex.M | regex.X,
)
"""Only what works on a text: "Plan my week: I work on Mondays" tells something, "Translate: I work" does not."""


def is_task_prompt(text: str) -> bool:
    """Whether a front end wrote the message, for a task of its own."""
    return _TASK_PROMPT.match(text) is not None


def of(text: str) -> str:
    """The message without the material in it."""
    operation = _OPERATION.search(text)
    if operation is not None:
        text = text[: operation.start()]
    if _TRANSCRIPT.search(text):
        text = _SPOKEN_LINE.sub("\n", text)
    return _QUOTED_LINE.sub("\n", _HEADING.sub("\n", text))


_WITHHELD = regex.compile(
    r"""
    (?: (?: ^ | [.!?,;:()\n–—-]\ * | \b(?:please|pls|but|and|so|just|kindly|ok|okay|also)\ + )
        (?: do\ not | don't | dont | never )
      | \byou\ (?:must|should|may)\ (?:not|never) ) \ + (?:ever\ +)?
    (?: (?:remember|memori[sz]e) \ + (?:this|that|it|these|those|any|what|the\ following)\b (?!\ +(?:when|as)\b)
      | (?:save|store|keep|record|log|note|write) \ + (?:down\ +)?
        (?: (?:the\ following | what\ (?:i|follows))\b
          | (?: (?:any\ of\ )?(?:this|that|it) | these | those | anything )
            (?:\ +(?:message|part|one|information|info|chat|conversation))? (?:\ +down)?
            (?: \ * (?:[.!?,;:)–—-]|$)
              | \ +(?: and|but|because|as|since|please|for\ later|anywhere | (?:in|to)\ +(?:your\ +)?memory )\b ) ) )
  | \bwithout\ +(?:remembering|memori[sz]ing|saving|storing|recording)\ +(?:this|that|it|any|what)\b
  | \b(?:merk|speicher|behalt|notier)(?:e|en\ sie|t)?\ (?:dir\ |es\ )?(?:das|dies|es|folgendes)\b[^.!?\n]{0,20}\bnicht\b
  | \b(?:das|dies|folgendes)\ (?:bitte\ )?nicht\ (?:merken|speichern|behalten|aufzeichnen)\b
  | (?<!\bje\ )\bne\ (?:retiens|retenez|(?:sauvegarde|enregistre|m[ée]morise|garde|note)[sz]?)\ pas
      \ (?:ça|cela|ceci|ce\ qui)
  | \bno\ (?:guardes?|recuerdes?|memorices?|almacenes?)\ (?:esto|eso|nada)\b
  | \bnon\ (?:salvare|ricordare|memorizzare|conservare)\ (?:questo|ciò|nulla)\b
  | \bnão\ (?:guarde|salve|memorize|se\ lembre)\ (?:isto|isso|disto|disso|nada)\b
  | \bне\ (?:запоминай|сохраняй|записывай)(?:те)?\b
  | (?:[别別]|不要|请勿|請勿)(?:[记記]住|保存|[记記][录錄]) | (?:覚え|記憶し|保存し|記録し)ないで
  | (?: ^ | [.!?,;(\n]\ * | \b(?:this|that|it)\ is\ + | \b(?:this|that)'s\ + ) (?:strictly\ +)? off\ the\ record \b
    """,
    regex.I | regex.X,
)


def are_withheld(text: str) -> bool:
    """Whether the message asks not to be remembered. That it asks so in a text that it hands over counts too."""
    return _WITHHELD.search(text.replace("’", "'")) is not None
