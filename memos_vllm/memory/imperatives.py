"""Commands in languages other than English: by the commonest imperatives, at the start of a sentence.

All that is not listed is taken for a statement, which does no harm: without a first person it stands in no
prompt (``standing``).
"""

from __future__ import annotations

import regex

_POLITE = r"bitte|s'il (?:te|vous) pla[iî]t|por favor|per favore|per piacere|alsjeblieft|пожалуйста|lütfen|proszę"
_GERMAN = (
    r"(?:schreib|erzähl|zeig|erklär|übersetz|fass|mach|nenn|sag|erstell|vergleich|korrigier|verbesser|beschreib|formulier|"
    r"generier|lös|prüf)(?:e|t|en sie)?|gib|gebt|geben sie|hilf|helfen sie|finde|antworte|berechne|liste"
)
_FRENCH = (
    r"(?:[ée]cri(?:s|vez)|tradui(?:s|sez)|fai(?:s|tes)|di(?:s|tes)|d[ée]cri(?:s|vez)"
    r"|(?:donne|explique|r[ée]sume|aide|montre|raconte|trouve|cr[ée]e|corrige|g[ée]n[èe]re|liste|propose|compare)z?)(?:-\w+)?"
)
_SPANISH = (
    r"escr[ií]b[ea](?:me|nos)?|expl[ií]ca(?:me|nos)?|explique|trad[uú]ce(?:me|lo)?|traduzca|res[uú]me(?:me|lo)?|ay[uú]dame|"
    r"haz(?:me|lo)?|mu[eé]strame|cu[eé]ntame|busca|encuentra|crea|corr[ií]ge(?:me|lo)?|genera|"
    r"dame (?:un|una|unos|unas|el|la|los|las|más|otr[oa]|algun[oa]s|ideas|\d+)|"
    r"dime (?:qu[eé]|c[oó]mo|cu[aá]\w+|d[oó]nde|un|una|el|la|los|las|si|algo)"
)
_ITALIAN = (
    r"scriv(?:i|imi|ete|a)|dammi|dimmi|spiega(?:mi)?|traduci(?:mi)?|riassumi(?:mi)?|aiutami|fammi|fai|mostra(?:mi)?|"
    r"raccontami|trova(?:mi)?|crea(?:mi)?|correggi(?:mi)?|elenca"
)
_PORTUGUESE = (
    r"escrev[ae](?:-me)?|me (?:d[êá]|diga|explique|explica|conte|ajude|ajuda|mostre)|d[êá]-me|diga(?:-me)?|explica|"
    r"traduza?|resum[ae]|ajud[ea](?:-me)?|faça|faz|mostre|conte(?:-me)?|encontre|crie|corrija|gere"
)
_OTHERS = (
    r"schrijf|vertel|geef|vertaal|maak|zoek|skriv|berätta|förklara|översätt|napisz|powiedz|podaj|wyjaśnij|przetłumacz|"
    r"(?:напиши|расскажи|объясни|переведи|сделай|покажи|помоги|скажи|дай|найди)(?:те)?"
)
_WISH = (
    r"ich (?:möchte|will|brauche),? dass (?:du|sie)|je (?:veux|voudrais) que (?:tu|vous)|quiero que|voglio che|"
    r"quero que voc[êe]"
)
_COMMAND = regex.compile(
    rf"(?:(?:{_POLITE})\b.*|.*\b(?:{_POLITE})[.!]*|(?:{_WISH})\b.*|(?:{_GERMAN}|{_FRENCH}|{_SPANISH}|{_ITALIAN}|"
    rf"{_PORTUGUESE}|{_OTHERS})\b(?!:|'| (?:ich|wir|is|are|was|has|ist|est|es|è)\b).*)",
    regex.S,
)


def is_command(plain: str) -> bool:
    """
    Args:
        plain: a sentence in lower case with straight apostrophes.
    """
    return _COMMAND.fullmatch(plain) is not None
