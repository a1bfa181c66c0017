"""What a sentence in a chat does: state, ask, greet or command. By rules, see ``extraction``.

All functions take the sentence in lower case with straight apostrophes.
"""

from __future__ import annotations

import regex

from memos_vllm.memory import imperatives


def says_something(plain: str) -> bool:
    """At least two words, or four characters of a script that writes without spaces."""
    if len(regex.findall(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]", plain)) >= 4:
        return True
    return len(regex.findall(r"[\p{L}\p{M}\p{N}'.-]*\p{L}[\p{L}\p{M}\p{N}'.-]*", plain)) >= 2


def is_noise(plain: str) -> bool:
    """Whether it is for the assistant, and tells nothing about the user."""
    return is_question(plain) or is_small_talk(plain) or is_command(plain)


_AUXILIARY = (
    "is|are|was|were|am|do|does|did|can|could|will|would|should|shall|have|has|had|may|might|"
    "isn't|aren't|don't|doesn't|didn't|can't|couldn't|won't|wouldn't|shouldn't"
)
_PRONOUN = (
    "i|you|he|she|it|we|they|there|my|your|his|her|our|their|the|this|that|these|those|a|an|any|anyone|anybody|someone"
)
_QUESTION = regex.compile(
    rf"""
      .* [?？؟՞] ["'”’»)\]」』）\s\p{{So}}\p{{Sk}}]*
    | .* [吗嗎か] [。.！!」』”\s]*
    | (?: (?:and|so|but|ok|okay|well|now|then) [,\ ]+ )?
      (?: (?:what|who|whom|whose|where|when|why|how|which) (?:'s|'re|'d|'ll)?
          \ (?: {_AUXILIARY} | about|come|many|much|old|long|far|often )\b .*
        | (?:what|who|where|when|why|how) (?:'s|'re)\ .*
        | (?: {_AUXILIARY} )\ (?: {_PRONOUN} )\b .*
        | any\ (?:ideas?|chance|thoughts|tips)\b .* )
    """,
    regex.S | regex.X,
)


def is_question(plain: str) -> bool:
    return _QUESTION.fullmatch(plain) is not None


_OPENERS = frozenset(
    """hi hello hey heya hiya howdy greetings good morning afternoon evening night goodnight bye goodbye cheers see cya
    later welcome thanks thank thx ty ok okay k sure yes yeah yep yup no nope nah great cool nice perfect awesome
    wonderful excellent amazing fantastic brilliant lovely fine got understood alright right exactly correct indeed wow
    lol haha hahaha hmm hm oh ah aha ugh oops sorry please sounds that's that never nevermind makes noted agreed well
    hola gracias adios bonjour merci salut hallo danke tschüss ciao grazie hej tack olá obrigado obrigada vielen muchas
    mille molte muito""".split()
)
_FILLERS = frozenset(
    """there all everyone everybody again so very much a lot for your the help to you too then my friend it i see it's
    is was sense mind problem worries soon tomorrow now of course and really just this answer advice time day have one
    thing me first today bad luck know let's go on everything assistant ai bot meet meeting talk with us
    dank beaucoup schön sehr bien""".split()
)
_SMALL_TALK_UNSPACED = regex.compile(
    r"""(?: 你好|您好|嗨|大家好|早上好|早安|晚上好|晚安|下午好|谢谢|謝謝|多谢|感谢|不客气|好的?|嗯+|是的|对
      | 没问题|明白了|知道了|再见|拜拜|你|您|了|啊|呀|吧
      | こんにちは|こんばんは|おはよう|ございます|ございました|ありがとう|どうも|はい|いいえ|わかりました|分かりました
      | 了解|です|しました|さようなら|おやすみ|なさい|またね|なるほど
      | [\p{P}\p{S}\s] )+""",
    regex.X,
)
_REPLY = regex.compile(
    r"(?:(?:yes|yeah|yep|no|nope|nah|sure|ok|okay)[,.! ]+)?"
    r"(?:i|we) (?:do|did|am|was|are|were|can|could|will|would|have|had|should|might|may|ca|wo)(?:n't| not)?"
    r"(?: too| so)?[.!]*"
    r"|(?:sure|yes|ok|okay|please)[, ]+go (?:ahead|on)[.!]*"
)
"""To a question of the assistant's; without it, it says nothing."""

_COURTESIES = ("how are you", "nice to meet you", "see you")


def is_small_talk(plain: str) -> bool:
    words = regex.findall(r"[\p{L}\p{M}']+", plain)
    if words and words[0] in _OPENERS and len(words) <= 10 and _OPENERS.union(_FILLERS).issuperset(words):
        return True
    if _REPLY.fullmatch(plain):
        return True
    return plain.startswith(_COURTESIES) or _SMALL_TALK_UNSPACED.fullmatch(plain) is not None


_FROM_NOW_ON = regex.compile(r"(?:\b(?:from now on|from here on|going forward)|^in (?:the )?future)\b[, ]*")
_VERBS = (
    "tell|write|rewrite|give|show|explain|summari[sz]e|translate|list|find|search|make|create|generate|help|describe|"
    "compare|calculate|compute|solve|fix|improve|rephrase|paraphrase|continue|answer|reply|respond|say|repeat|recommend|"
    "suggest|draft|convert|check|review|analy[sz]e|define|name|think|imagine|act|pretend|behave|forget|stop|try|use|add|"
    "remove|delete|change|update|run|open|play|send|read|look|go|do|don't|keep|teach|ask|format|sort|count|extract|"
    "classify|debug|refactor|implement|code|design|plan|provide|correct|proofread|edit|shorten|expand|elaborate|wait|"
    "start|begin|guess|suppose|supposing|pick|choose|draw|build|sing|complete|finish|consider|identify|assume|speak|talk|"
    "put|set|turn|call|remind|let|let's|lets|be|never|always"
)
_COMMAND = regex.compile(
    rf"""
      (?: (?:ok|okay|now|then|so|and|also|first|next|alright|great|hey) [,\ ]+ )*
      (?: (?:please|pls|kindly)\b .*
        | (?:just\ |simply\ |always\ |never\ )? (?: {_VERBS} )\b
          (?! [:']|\ (?:is|are|was|were|has|had|will|means|of)\b ) .*
        | i (?:'d|\ would)? \ (?:want|need|like|love)\ (?:you|u)\ to\b .*
        | .* ,?\ please [.!]* )
    | (?: [请請] | [帮幫]我 | [给給]我 | 告[诉訴]我 | 写 | 翻译 | 解释 | 总结 | 介绍 | 推荐 ) .*
    | .* (?: ください | 下さい | 教えて | お願いします | 書いて ) [。！!]*
    """,
    regex.S | regex.X,
)


def is_command(plain: str) -> bool:
    return _COMMAND.fullmatch(plain) is not None or imperatives.is_command(plain)


def is_standing_order(plain: str) -> bool:
    """A command that is to hold for what comes: "From now on, answer in French"."""
    order = _FROM_NOW_ON.sub("", plain, 1)
    return order != plain and not is_question(plain) and is_command(order.strip(" ,"))


_WRITING_TASK = regex.compile(
    r"(?:write|draft|compose|generate|create|translate|rewrite|summari[sz]e|make|convert|improve|edit|proofread|code"
    r"|implement|design)\b"
)
_POLITE = regex.compile(r"(?:(?:please|pls|now|so|hi|hello|hey|ok|okay)[, ]+|(?:can|could|would|will) you )*")
_OF_ANSWERS = regex.compile(r"\b(?:answers?|reply|replies|respond|responses?|call me|address me)\b")


def is_writing_task(plain: str) -> bool:
    """Whether it asks for a text or a program: "Could you write a poem?"."""
    return _WRITING_TASK.match(plain, _POLITE.match(plain).end()) is not None


def is_of_answers(plain: str) -> bool:
    """Whether an instruction names the assistant's answers, and so no text that it is to write."""
    return _OF_ANSWERS.search(plain) is not None
