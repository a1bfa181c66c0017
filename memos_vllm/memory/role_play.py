"""What of a message is outside of a play that it sets up: "You are a pirate. My name is Jack Sparrow."

In a play nobody speaks of himself. A play begins with a sentence that sets it up, and lasts to the end of the
message. What stands before "Let's role-play", "Pretend ..." or "Imagine ..." is outside; so is what says that it is
("In real life, I live in Oslo"). "You are a pirate" gives the assistant a part, and who speaks before it may speak
in the play already. An expert is no part in a play: "You are an experienced tax adviser. I live in Spain."
"""

from __future__ import annotations

from collections.abc import Sequence

import regex

_EXPERT = (
    r"(?:(?:[\p{L}-]+\ ){0,2} (?:expert|experienced|senior|professional|skilled|seasoned|specialist|certified|qualified"
    r"|world-class|knowledgeable)s?\b)"
)
_PRAISE = (
    r"(?:(?:[\p{L}-]+\ ){0,2} (?:helpful|useful|great|good|best|better|worst|favou?rite|wonderful|amazing|awesome"
    r"|brilliant|genius|star|hero|angel|legend|life-?saver|champ|gem|treasure|joy|ai|assistant|chatbot|bot|machine"
    r"|computer|program|tool|model|llm|robot|only|first|one|reason)s?\b"
    r" | (?:really|very|truly|such|so|much|real|total|absolute|bit|little|liar|idiot|fool)\b)"
)
_LEAD = (
    r"(?:(?:ok|okay|so|now|then|please|hi|hello|hey|and|but|well|from\ now\ on|for\ the\ rest\ of\ this\ chat)[,!\ ]+"
    r"|(?:can|could|will|would)\ you\ |i(?:'d|\ would)?\ (?:want|like|need)\ you\ to\ |let(?:'s|s|\ us)\ )*"
)
_SETS_UP = regex.compile(
    rf"""{_LEAD} (?:
        (?:i(?:'d|\ would)?\ (?:want|like)\ to\ )?(?:(?:do|play|start|have|begin)\ (?:a\ |some\ )?)?
          (?:role-?\ ?play|make-?believe|pretend)\b (?!\ (?:is|are|was)\b)
      | (?<!\bcan\ you\ |\bcould\ you\ )(?:imagine|make\ believe|suppose|supposing|assume|assuming)\b
          (?!\ (?:is|are|was)\b)
      | say\ (?:that\ )?(?:i|you|we|my)\b (?=.*\b(?:are|am|live|have|were|is)\b)
      | act\ (?:as|like|out)\b (?!\ (?:an?|the|my)\ {_EXPERT}) | play\ the\ (?:role|part)\ of
      | take\ (?:on\ )?the\ (?:role|part)\ of
      | be\ my\ (?:girlfriend|boyfriend|wife|husband|mother|father|boss|king|queen|master|slave)\b
      | (?:you|i)(?:'ll|\ will|'re\ going\ to|\ are\ going\ to)\ (?:be|play)
          \ (?:a|an|the|my|your)\b (?=.*\b(?:you|i)(?:'ll|\ will|\ am|'m|\ are|'re)\b)
      | you\ play\ (?:a|an|the|my)\b | in\ this\ (?:role-?\ ?play|game|story)\b
      | (?:stell\ dir\ vor|stellen\ sie\ sich\ vor|tu\ so,?\ als|lass\ uns\ (?:ein\ )?rollenspiel)
      | (?:imagine[zr]?\ que|faisons\ comme\ si|fais\ comme\ si|jouons\ un\ jeu\ de\ r[ôo]le)
      | (?:imagin[ae]\ que|finge\ que|juguemos\ (?:a\ )?un\ juego\ de\ rol)
      | (?:immagina\ (?:che|di)|fai\ finta\ (?:che|di)) | (?:imagine\ que|finja\ que|fa[çz]a?\ de\ conta\ que)
    ) .*""",
    regex.X | regex.S,
)
_GIVES_A_PART = regex.compile(
    rf"""{_LEAD} (?:
        you(?:'re|\ are)\ now\ (?!ready\b|free\b)
      | you(?:'re|\ are)\ (?:going\ to\ be\ )*(?:a|an|the|my)\ (?! {_EXPERT} | {_PRAISE} )
      | du\ bist\ (?:jetzt\ )?(?:ein|eine|der|die|mein|meine)\b | tu\ es\ (?:maintenant\ )?(?:un|une|le|la|mon|ma)\b
      | (?:t[úu]\ )?eres\ (?:ahora\ )?(?:un|una|el|la|mi)\b | (?:ora\ )?sei\ (?:un|uno|una|il|la|mio|mia)\b
      | voc[êe]\ [ée]\ (?:agora\ )?(?:um|uma|o|a|meu|minha)\b
    ) .*""",
    regex.X | regex.S,
)
_OUTSIDE = regex.compile(
    r"(?:in\ (?:real\ life|reality)|irl|ooc|out\ of\ character|outside\ (?:of\ )?(?:the|this)\ "
    r"(?:role-?\ ?play|game|play|story))\b",
    regex.X,
)


def outside(sentences: Sequence[str]) -> Sequence[str]:
    """Those sentences of one message that are not in a play."""
    plain = [sentence.strip(" *[(").replace("’", "'").lower() for sentence in sentences]
    if any(_GIVES_A_PART.fullmatch(each) for each in plain):
        start = 0
    else:
        start = next((place for place, each in enumerate(plain) if _SETS_UP.fullmatch(each)), len(plain))
    rest = zip(sentences[start:], plain[start:], strict=True)
    return [*sentences[:start], *(sentence.strip(" *[]()") for sentence, each in rest if _OUTSIDE.match(each))]
