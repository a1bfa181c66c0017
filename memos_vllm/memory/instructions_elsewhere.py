"""Instructions that stand in German, French, Spanish, Italian and Portuguese: the commonest forms.

A sentence is one if it begins with an imperative of answering (or with the words that make it stand), has a word that
makes it stand ("immer", "désormais", "nunca") and one of what is known as a way to answer.
"""

from __future__ import annotations

import regex

_NAMES = {
    "english": "englisch anglais inglés ingles inglese inglês",
    "german": "deutsch allemand alemán aleman tedesco alemão",
    "french": "französisch français francais francés frances francese francês",
    "spanish": "spanisch espagnol español espanol spagnolo espanhol",
    "italian": "italienisch italien italiano",
    "portuguese": "portugiesisch portugais portugués portoghese português portugues",
    "dutch": "niederländisch néerlandais", "polish": "polnisch polonais polaco polacco",
    "russian": "russisch russe ruso russo", "turkish": "türkisch turc turco",
    "chinese": "chinesisch chinois chino cinese", "japanese": "japanisch japonais japonés giapponese",
}  # fmt: skip
ENGLISH_NAMES = (
    *_NAMES,
    *"swedish danish norwegian finnish ukrainian czech greek arabic hebrew hindi mandarin korean thai".split(),
)
_LANGUAGES = {name: english for english, names in _NAMES.items() for name in names.split()}

MARKS = (
    r"immer|stets|nie|niemals|nie\ wieder|ab\ (?:jetzt|sofort)|von\ (?:nun|jetzt)\ an|künftig|zukünftig|in\ zukunft"
    r"|toujours|jamais|d[ée]sormais|dor[ée]navant|[àa]\ partir\ de\ maintenant|[àa]\ l'avenir"
    r"|siempre|nunca|jam[áa]s|a\ partir\ de\ ahora|de\ ahora\ en\ adelante|desde\ ahora"
    r"|sempre|mai|d'ora\ in\ (?:poi|avanti)|da\ ora\ in\ poi|in\ futuro"
    r"|jamais|de\ agora\ em\ diante|a\ partir\ de\ agora|daqui\ (?:em\ diante|para\ a\ frente)|wieder"
)
_POLITE = r"bitte|s'il\ (?:te|vous)\ pla[iî]t|por\ favor|per\ favore"
_VERBS = (
    r"antworte|antworten\ sie|schreibe?|schreiben\ sie|sprich|sprechen\ sie|rede|verwende|verwenden\ sie|benutze?"
    r"|benutzen\ sie|nutze|halte|halten\ sie|du\ (?:darfst|kannst)|sie\ (?:dürfen|können)"
    r"|r[ée]pond(?:s|ez)(?:-moi)?|[ée]cri(?:s|vez)(?:-moi)?|parlez?(?:-moi)?|utilisez?|n'utilisez?|n'emploiez?|emploiez?"
    r"|ne\ (?:r[ée]ponds|r[ée]pondez|parle)"
    r"|resp[óo]nd[ea](?:me)?|cont[ée]st[ae](?:me)?|escr[ií]b[ea](?:me)?|h[áa]bl[ae](?:me)?|us[ae]|utili[cz][ae]"
    r"|no\ (?:uses|utilices|respondas)|uses|utilices|respondas"
    r"|rispond[ia](?:mi)?|scrivi(?:mi)?|parla(?:mi)?|utilizza|non\ (?:usare|utilizzare|rispondere)"
    r"|responda(?:-me)?|escrev[ae]|fal[ea]|utiliz[ae]|não\ (?:use|utilize|responda)"
)
_ORDER = regex.compile(
    rf"(?:(?:{_POLITE})[,\ ]+)?(?:(?:{MARKS})[,\ ]+)?(?:(?:{_POLITE})[,\ ]+)?"
    rf"(?:{_VERBS})\b[^,;:?\"()]*(?:,?\ (?:{_POLITE}))?"
)
_MARK = regex.compile(rf"\b(?:{MARKS})\b")
_TOPIC = regex.compile(
    rf"""\b(?: (?:auf|en|in|em | (?<=\b(?:sprich|sprechen\ sie|rede|parlez?|habl[ae]|parla|fal[ea])\ )
          (?:immer|nur\ noch|nur|toujours|siempre|sempre) )\ (?P<language> {"|".join(_LANGUAGES)} )
      | (?P<use> [ée]mojis?|smileys|emoticons?|[ée]motic[ôo]nes?|emoticonos|faccine
        | (?P<bullets> aufzählungen|stichpunkte|puces|viñetas|elenchi\ puntati|marcadores )
        | (?P<tables> tabellen|tableaux|tablas|tabelle|tabelas ) )
      | (?P<units> metrische[nr]?\ (?:einheiten|system) | syst[èe]me\ m[ée]trique | unit[ée]s\ m[ée]triques
        | sistema\ m[ée]trico
        | unidades\ m[ée]tricas | unità\ metriche | sistema\ metrico )
      | (?P<short> kurz|knapp|bri[èe]vement|brevemente|in\ breve|de\ forma\ breve ) )\b""",
    regex.X,
)
_NOT = regex.compile(
    r"\b(?:nie|niemals|keine|nicht|jamais|ne|nunca|jam[áa]s|no|non|mai|não|ohne|sans|sin|senza|sem)\b|\bn'"
)
_OF_A_TASK = regex.compile(
    r"\b(?:dies\w*|hier|folgend\w*|cet(?:te)?|ce|ces|est[ea]s?|quest[oaei]|nest[ea]|isto|mein\w*|mon|mi|mio|meu)\b"
)
_PERMITTED = regex.compile(r"(?:du|sie) ")


def of(plain: str) -> tuple[str, str, bool] | None:
    """Topic, value and whether it holds, as ``instructions.Instruction`` has them.

    Args:
        plain: in lower case with straight apostrophes, without the full stop.
    """
    if not _ORDER.fullmatch(plain) or not _MARK.search(plain) or _OF_A_TASK.search(plain):
        return None
    match = _TOPIC.search(plain)
    if match is None or (_PERMITTED.match(plain) is None and "wieder" in plain.replace("nie wieder", "").split()):
        return None
    holds = not _NOT.search(plain)
    if match["language"]:
        return "answers: language", _LANGUAGES[match["language"]], holds
    if match["units"]:
        return "answers: units", "metric", holds
    if match["short"]:
        return "answers: length", "short", holds
    return "use", "bullet point" if match["bullets"] else "table" if match["tables"] else "emoji", holds
