"""Remembering by rules: which of a user's words are worth keeping.

Kept: statements, in the user's own words (less a greeting in front). Not kept: questions, greetings,
thanks, acknowledgements and commands to the assistant, unless they stand (``instructions``) or the sentence asks to
remember something; then its content is kept. Code and long pastes become one document. A text that is handed over to be
worked on is not the user's word (``own_words``), nor is what is said in a play (``role_play``). What tells a
password, a key or a card number is not kept, whatever it asks (``credentials``).

The word lists are for English, with the commonest forms of Chinese and Japanese and the commonest
commands of other languages (``imperatives``). All else counts as a statement unless it ends with a question
mark; but only what is about the user may stand in every prompt, and the rest is a remark (``standing``).
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

from memos_vllm.memory import claims, credentials, instructions, own_words, role_play, sentences, speech, standing

LONG_TEXT_CHARS = 2000
_CODE = regex.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", regex.M | regex.S)


@dataclass(frozen=True, slots=True)
class Extract:
    text: str
    type: str
    """``fact``, ``preference``, ``profile``, ``remark`` or ``document``."""

    rule: str
    """Why it was kept: ``statement``, ``asked``, ``code`` or ``long``."""


def extract(text: str) -> list[Extract]:
    """What to keep of one message, in its order."""
    text = text.strip()
    if own_words.is_task_prompt(text):
        return []
    if len(text) > LONG_TEXT_CHARS:
        return [] if credentials.are_in_document(text) else [Extract(text, "document", "long")]
    said = own_words.of(_CODE.sub("\n\n", text))
    told = role_play.outside(sentences.split(said))
    has_task = any(speech.is_writing_task(_plain(sentence)) for sentence in told)
    kept = [extracted for sentence in told if (extracted := judge(sentence, has_task=has_task))]
    code = "\n\n".join(match[0].strip("\n") for match in _CODE.finditer(text))
    if code and not credentials.are_in_document(code):
        kept.append(Extract(code, "document", "code"))
    return kept


def judge(sentence: str, *, has_task: bool = False) -> Extract | None:
    """Whether to keep one sentence, and as what.

    Args:
        has_task: its message asks for a text; "Always use rhymes" may be of that text then.
    """
    if credentials.are_in(sentence):
        return None
    statement = _without_lead_in(sentence)
    if instruction := instructions.of(statement):
        is_of_task = has_task and not instruction.is_for_good and not speech.is_of_answers(_plain(statement))
        return None if is_of_task else Extract(statement, kind_of(statement), "asked")
    if asked := _asked_to_remember(statement):
        return Extract(asked, kind_of(asked), "asked")
    plain = _plain(statement)
    if speech.is_standing_order(plain):
        return Extract(statement, kind_of(statement) if claims.claim_of(statement) else "preference", "asked")
    if claims.claim_of(statement) is None and (not speech.says_something(plain) or speech.is_noise(plain)):
        return None
    kind = kind_of(statement)
    if kind == "fact" and not standing.may_stand(statement):
        kind = "remark"
    if kind == "preference" and claims.claim_of(statement) is None and standing.is_of_what_was_said(statement):
        kind = "remark"
    return Extract(statement, kind, "statement")


def _plain(sentence: str) -> str:
    return sentence.strip().replace("’", "'").lower()


_PREFERENCE = regex.compile(
    r"""
    \b my\ (?:favou?rite|preferred) \b
    | \b i\ (?:(?:really|very|much|also|always|usually|generally|don't|do\ not|never|only)\ )*
      (?:like|love|prefer|enjoy|adore|hate|dislike|detest|can't\ stand|cannot\ stand) \b (?!\ (?:you|u)\ to\b)
    | 我 (?:最|很|非常|不)? (?:喜欢|喜歡|爱|愛|讨厌|討厭) | (?:が|は) (?:大)? (?:好き|嫌い)
    """,
    regex.I | regex.X,
)
_PROFILE = regex.compile(
    r"""(?:
    i\ (?:live|work|study)\ (?:in|at|as|for)\b | i\ was\ born\b | i\ come\ from\b
    | i(?:\ a|')m\ (?:from|called|married|\d+\ years\ old)\b
    )""",
    regex.I | regex.X,
)


def kind_of(statement: str) -> str:
    """What a user likes is a preference, who he is his profile; anything else he states is a fact."""
    plain = statement.replace("’", "'")
    if _PREFERENCE.search(plain):
        return "preference"
    claim = claims.claim_of(statement)
    if _PROFILE.match(plain.strip()) or (claim and claim.subject.startswith("my ")):
        return "profile"
    return "preference" if instructions.of(statement) else "fact"


_ASKED = regex.compile(
    r"""
    (?: (?:hi|hey|hello|ok|okay|so|and|also|but|oh|well) [,\ ]+ )?
    (?P<polite> (?:can|could|will|would)\ you\ + )?
    (?: please[,\ ]+ | kindly\ )? (?:always\ )?
    (?: remember | note | don't\ forget | do\ not\ forget | never\ forget | keep\ in\ mind | bear\ in\ mind
      | memori[sz]e | make\ a\ note )
    (?: [,\ ]+please )?
    (?: \s*[,:]\s* | \s+ (?:that|this|the\ following)? \s* [,:]? \s* )
    (?P<content> .+ )
    """,
    regex.I | regex.S | regex.X,
)
_NO_CONTENT = regex.compile(r"(?:when|how|what|who|where|why|if|whether|me|us|it|him|her|them)\b", regex.I)
_TO_DO = regex.compile(r"to\b", regex.I)
_POLITE_END = regex.compile(r",? (?:please|thanks|thank you|for me|ok|okay)(?=[.!?]*$)", regex.I)
_ASKED_CHINESE = regex.compile(
    r"""
    [请請]? [你您]? (?:[帮幫]我)? 要? (?: [记記]住 | [记記]得 | [别別]忘了 | 不要忘[记記] ) (?:了|一下)? [，,：:\ ]*
    (?P<content> .{2,} )
    """,
    regex.X,
)
_ASKED_JAPANESE = regex.compile(
    r"""
    (?P<content> .{2,}? )
    (?: という(?:こと|の) | こと | って | と | の )? [をは]? 、?
    (?: 覚えて | おぼえて | 記憶して | 忘れないで ) (?:おいて)? (?:いて)? (?: ください | 下さい | ね | くれ )? [。！!]*
    """,
    regex.X,
)
_QUESTION_ENDS = ("?", "？", "吗", "嗎", "か")


def _asked_to_remember(sentence: str) -> str | None:
    """What the sentence asks to remember, as a sentence of its own."""
    stripped = sentence.strip()
    if match := _ASKED.fullmatch(stripped.replace("’", "'")):
        content = stripped[match.start("content") :]
        if _NO_CONTENT.match(content) or (content.endswith("?") and not match["polite"]):
            return None
        if _TO_DO.match(content):  # "Remember to call Ann" says nothing without its verb
            return stripped
        content = _POLITE_END.sub("", content.rstrip("?"))
        return _capitalise(content if content.endswith((".", "!")) else content + ".")
    for pattern in (_ASKED_CHINESE, _ASKED_JAPANESE):
        match = pattern.fullmatch(stripped)
        if match and not match["content"].endswith(_QUESTION_ENDS):
            return match["content"] if match["content"].endswith(("。", "！")) else match["content"] + "。"
    return None


_LEAD_IN = regex.compile(
    r"""
    (?: (?: (?:hi|hello|hey|thanks|thank\ you|thx) (?:\ (?:there|all|so\ much|a\ lot|again))?
          | (?: (?:oh|and|also|well|ok|okay)[,\ ]+ )? (?: by\ the\ way | btw | fyi | for\ your\ information
              | (?:just\ )?(?:so\ (?:that\ )?you\ know | to\ let\ you\ know | (?:as\ an?\ )?fyi) | for\ the\ record
              | in\ real\ life | in\ reality | irl | ooc | out\ of\ character
              | (?:as|like)\ i(?:\ have|'ve|\ had)?(?:\ (?:already|just))?\ (?:said|mentioned|told\ you|wrote)
                (?:\ (?:before|earlier|already|above|yesterday|last\ time|you))? ) )
        (?: \s*(?:[,:;]|--?|–|—)\s* | \s+(?=(?:i|i'(?:m|ve|d|ll)|im|my|we|our|always|never|please|remember)\b) ) )+
    (?=\S)
    """,
    regex.I | regex.X,
)
"""Greetings, and what only says that a statement follows."""


def _without_lead_in(sentence: str) -> str:
    match = _LEAD_IN.match(sentence.replace("’", "'"))
    return _capitalise(sentence[match.end() :]) if match else sentence


def _capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
