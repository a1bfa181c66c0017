"""Which language a text is in, as far as stemming needs to know, and the stem of a word in it.

A script that one language (or one stemmer) stands for decides word by word. Languages of the Latin script
are told apart by their commonest words, since nothing else is safe on a sentence of five words: the
language with most of them in the text wins, English where none has two more than English has. A wrong
guess must not hide a text, so a word of a Latin language other than English has its English stem as well
(``stems``): whatever a short query is taken for, the two meet in one of them.
"""

from __future__ import annotations

import threading
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex
import snowballstemmer

from memos_vllm.memory.normal_forms import normalised

ENGLISH = "english"
_MAX_WORD_CHARS = 40  # beyond: no word, but a hash or base64

_ENGLISH_STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those am is are was were be
    been being have has had having do does did doing would should could ought i'm you're he's she's it's we're they're
    i've you've we've they've i'd you'd he'd she'd we'd they'd i'll you'll he'll she'll we'll they'll isn't aren't
    wasn't weren't hasn't haven't hadn't doesn't don't didn't won't wouldn't shan't shouldn't can't cannot couldn't
    mustn't let's that's who's what's here's there's when's where's why's how's a an the and but if or because as
    until while of at by for with about against between into through during before after above below to from up down
    in out on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very can will""".split()
)
"""Snowball's English list; such words match everything and mean nothing here."""

_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "german": """der die das den dem des ein eine einen einem einer und oder aber nicht ist sind war ich du er sie
            wir ihr mir mich dir dich mein meine meinen mit von zu zum zur im auf für auch wie was wo wann wer habe hat
            haben werden wird noch nur sich es als bei aus nach über""",
        "french": """le la les un une des du de et ou mais ne pas est sont était je tu il elle nous vous ils mon ma mes
            ton ta ses son dans sur avec pour par que qui quoi où quand au aux ce cette ces j'ai c'est suis ai avez plus
            en se leur""",
        "spanish": """el la los las un una unos de del y o pero no es son era yo tú él ella nosotros mi mis tu su sus en
            con por para que qué quién dónde cuándo al lo le se me te este esta está estoy soy muy más como cómo""",
        "italian": """il lo la gli le un una di del della dei e o ma non è sono era io tu lui lei noi mio mia miei tuo
            suo in con per che chi dove quando al alla si mi ti ci questo questa più come ho ha sei nel nella da""",
        "portuguese": """o a os as um uma de do da dos das e ou mas não é são era eu tu ele ela nós meu minha seu sua em
            no na nos nas com por para que quem onde quando ao à se me este esta isso muito mais como estou sou foi""",
        "dutch": """de het een en of maar niet is zijn was ik jij hij zij wij mijn jouw haar in op met van voor aan te
            dat die wat wie waar wanneer er ook naar bij uit om heb heeft ben je we ze dit deze hoe nog""",
        "swedish": """en ett och eller men inte är var jag du han hon vi ni min mitt mina din sin i på med av för till
            att som det den de vad vem när har hade om från sig mig dig där hur också""",
        "danish": """en et og eller men ikke er var jeg du han hun vi min mit mine din sin i på med af for til at som
            det den de hvad hvem hvor hvornår har havde om fra sig mig dig der også""",
        "norwegian": """en et ei og eller men ikke er var jeg du han hun vi min mitt mine din sin i på med av for til å
            som det den de hva hvem hvor når har hadde om fra seg meg deg der også""",
        "finnish": """ja tai mutta ei en on oli olen olet ovat minä sinä hän me te he minun sinun hänen se tämä mikä
            kuka missä milloin että kun kuin myös niin joka minulla hänellä""",
        "polish": """i lub ale nie jest są był była ja ty on ona my wy mój moja moje twój w we na z ze do od dla że co
            kto gdzie kiedy się to ten ta jak mam ma mnie już też""",
        "turkish": """ve veya ama değil ben sen o biz siz onlar benim senin onun bir bu şu için ile ne kim nerede çok da
            de mi mı var yok gibi daha en""",
    }.items()
}

_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _FUNCTION_WORDS.items():
    for _word in _words:
        _LANGUAGES_OF.setdefault(_word, []).append(_language)

_SCRIPTS = (
    (regex.compile(r"\p{Cyrillic}"), "russian"),
    (regex.compile(r"\p{Greek}"), "greek"),
    (regex.compile(r"\p{Arabic}"), "arabic"),
    (regex.compile(r"\p{Devanagari}"), "hindi"),
    (regex.compile(r"\p{Tamil}"), "tamil"),
    (regex.compile(r"\p{Armenian}"), "armenian"),
    (regex.compile(r"\p{Hebrew}"), "yiddish"),
)
_NO_STEMMER = frozenset({"yiddish"})  # Hebrew is far commoner in that script, and the stemmer is not for it
_stemmers: dict[str, Any] = {}
_lock = threading.Lock()  # a stemmer keeps its state on itself


def of(words: Sequence[str]) -> str:
    """The Latin-script language of a text, from its words in lower case."""
    counts: Counter[str] = Counter()
    english = 1
    for word in words:
        if word in _ENGLISH_STOP_WORDS:
            english += 1
        for language in _LANGUAGES_OF.get(word, ()):
            counts[language] += 1
    best = max(counts, key=lambda language: counts[language], default=ENGLISH)  # of equals, the first met
    return best if counts[best] > english else ENGLISH


def is_stop_word(word: str, language: str) -> bool:
    return word in (_ENGLISH_STOP_WORDS if language == ENGLISH else _FUNCTION_WORDS[language])


def stems(word: str, language: str) -> tuple[str, ...]:
    """The forms under which a word is indexed: one, or with the English one two.

    Args:
        word: in lower case (folded).
        language: of the text, as ``of`` says.
    """
    if word.isascii() and language == ENGLISH:
        return (_stem(word, ENGLISH),)
    for script, own in _SCRIPTS:
        if script.search(word):
            return (_stem(word, own),)
    return tuple(dict.fromkeys((_stem(word, language), _stem(word, ENGLISH))))


@lru_cache(maxsize=1 << 16)
def _stem(word: str, language: str) -> str:
    """The Snowball stem; of Latin letters without accents, which people leave out as they like."""
    if len(word) <= _MAX_WORD_CHARS and language not in _NO_STEMMER:
        with _lock:
            if language not in _stemmers:
                _stemmers[language] = snowballstemmer.stemmer(language)
            word = str(_stemmers[language].stemWord(word))
    return word if word.isascii() else _without_accents(word)


_LATIN = regex.compile(r"\p{Latin}")


def _without_accents(word: str) -> str:
    if not _LATIN.search(word):
        return word
    bare = "".join(char for char in normalised("NFD", word) if not unicodedata.combining(char))
    return normalised("NFC", bare)
