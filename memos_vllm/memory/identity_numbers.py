"""Numbers that are as good as a password: of identity papers and bank accounts, and what opens a safe.

An IBAN is known by its country's length and its check digits (ISO 13616). Others are known by what they are called,
and only with a value: "My passport number is in the drawer" tells none.
"""

from __future__ import annotations

import regex

_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FI NL", 19: "SI", 20: "AT EE LT LU", 21: "CH HR LI LV", 22: "BG DE GB IE RS",
    23: "AE IL", 24: "CZ ES RO SA SE SK", 25: "PT", 26: "IS TR", 27: "FR GR IT MC SM", 28: "CY HU PL", 29: "BR UA",
    31: "MT",
}  # fmt: skip
"""Characters of an IBAN."""

_OF_COUNTRIES = "|".join(
    rf"(?:{countries.replace(' ', '|')})[0-9]{{2}}(?:[ -]?[A-Z0-9]){{{length - 4}}}"
    for length, countries in _LENGTHS.items()
)
_IBAN_START = regex.compile(r"(?<=(?<![A-Za-z0-9])[A-Za-z]{2})[0-9]{2}")
"""Found fast in a long text, where few digits stand behind two letters."""

_IBAN = regex.compile(rf"(?:{_OF_COUNTRIES})(?![A-Z0-9])", regex.I)
_NAMES = r"""(?:
    (?: passport|visa | (?:credit|debit|bank|visa|master)?\ ?card | (?:bank|savings|checking|giro)\ account | routing
      | (?:(?:national|personal|government|employee|military)\ )?(?:id|identity|identification)(?:\ card)?
      | (?:driver'?s?|driving)\ licen[cs]e | national\ insurance | (?:health|social)\ insurance | medicare
      | tax(?:payer)?(?:\ (?:id|identification|file|reference))? | social\ security )
    \ (?: number | no\b\.? | num\b | \# )
  | sort\ code | tax\ id | itin | aadhaar(?:\ number)? | codice\ fiscale | cpf | curp | dni | nif
  | (?:reise)?passnummer | (?:personal)?ausweisnummer | personalausweis-?nr\.? | steuer-?id(?:entifikationsnummer)?
  | steuernummer | sozialversicherungsnummer | kontonummer | kreditkartennummer | führerscheinnummer
  | num[ée]ro\ (?:de|du)\ (?:mon\ )?(?:passeport|carte\ d'identit[ée]|s[ée]curit[ée]\ sociale|compte)
  | n[úu]mero\ (?:de|do|da|del)\ (?:mi\ |meu\ )?(?:pasaporte|passaporte|passaporto|tarjeta|cartão|cuenta|conta|conto)
  | numero\ (?:di|del)\ (?:mio\ )?(?:passaporto|conto|carta\ d'identità) )"""
_IS = r"(?: \s?[=:]\s? | 's\ | \ (?:is|was|are|ist|lautet|est|es|è|é)\ (?:now\ )? | \ )"
_VALUE = r"[\"'“]? \p{L}{0,4} [\ .-]? \d (?: [\ ./-]? \p{L}{0,2} \d ){3}"
_UNSPACED = (
    r"(?:身份证号码?|身分證號碼?|护照号码?|護照號碼?|银行卡号|マイナンバー|パスポート番号|주민등록번호|여권번호)"
    r"\s?(?:是|为|為|は|:|：|은|는)?\s?[A-Z]{0,2}\d{4}"
)
_LOCKED = r"(?:safe|vault|strongbox|locker|padlock|(?:[\p{L}-]+\ )?lock|suitcase|alarm(?:\ system)?|tresor)"
_CODE = r"(?:combination|combo|code|passcode|pin)"
_OPENS = r"[\"'“]? (?:(?:left|right|l|r)\ ?)? \d"
_TOLD = regex.compile(
    rf"""
    \b{_NAMES} (?:\ (?:for|of)\ [^.!?\n]{{1,40}}?)? {_IS} {_VALUE}
  | \d \S{{3,20}} \ is\ (?:my|our|his|her|the)\ (?:[\p{{L}}-]{{1,20}}\ ){{0,2}}? {_NAMES}
  | \b(?:my|our)\ passport{_IS}\p{{L}}{{0,3}}\d{{6,9}}\b
  | {_UNSPACED}
  | \b{_LOCKED} (?:'s)? \ {_CODE} {_IS} {_OPENS}
  | \b{_CODE} \ (?:for|of|to)\ (?:my|our|the|his|her)\ (?:[\p{{L}}-]{{1,20}}\ ){{0,3}}? {_LOCKED}
      (?:\ (?:at|in)\ [^.!?\n]{{1,40}}?)? {_IS} {_OPENS}
  | \b{_LOCKED} \ (?: opens|unlocks | is\ (?:opened|unlocked) )\ with\ (?:the\ )?(?:{_CODE}\ )? {_OPENS}
  | \d \S{{0,20}} \ (?:is|opens)\ (?:my|our|his|her|the)\ (?:
        (?:[\p{{L}}-]{{1,20}}\ ){{0,2}}? {_LOCKED} (?:'s)? \ {_CODE}
      | {_CODE}\ (?:for|of|to)\ (?:my|our|the|his|her)\ (?:[\p{{L}}-]{{1,20}}\ ){{0,2}}? {_LOCKED} )\b
  | \b(?:tresor|safe|schloss|zahlen)-?(?:code|kombination|nummer) {_IS} {_OPENS}
    """,
    regex.I | regex.X,
)


def are_told(said: str) -> bool:
    """Whether a sentence, with straight apostrophes, names such a number and has its value."""
    return _TOLD.search(said) is not None


def has_iban(text: str) -> bool:
    found = (_IBAN.match(text, start.start() - 2) for start in _IBAN_START.finditer(text))
    return any(iban is not None and _has_check_digits(iban[0]) for iban in found)


def _has_check_digits(iban: str) -> bool:
    """Country and check digits go to the end, letters count from A = 10; the number modulo 97 is 1."""
    bare = "".join(char for char in iban if char.isalnum())
    return int("".join(str(int(char, 36)) for char in bare[4:] + bare[:4])) % 97 == 1
