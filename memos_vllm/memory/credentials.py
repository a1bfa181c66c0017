"""Passwords, keys, and numbers of cards, accounts and identity papers, which chat does not remember.

Found are names of secrets with a value ("my PIN is 1234", ``API_KEY=...``), keys in the formats that their issuers
give them, private keys, addresses with a password (``scheme://user:password@host``), and numbers of 13 to 19 digits
with a card's first digit and check digit (Luhn). Numbers of identity papers, and what opens a safe, are in
``identity_numbers``, with IBANs.
"""

from __future__ import annotations

import regex

from memos_vllm.memory import identity_numbers

_NAMES = (
    r"pass(?:word|code|phrase|wd)s?|pwd|pw|pass\ phrase|pin(?:\ code|\ number)?|otp|cvv2?|cvc2?"
    r"|(?:api|secret|access|private|encryption|recovery|ssh)[\ _-]?keys?"
    r"|(?:access|auth|authentication|bearer|api|refresh|secret)[\ _-]?tokens?|client[\ _-]?secrets?"
    r"|(?:security|recovery|backup|verification|one[\ -]time)[\ ]codes?|(?:recovery|seed)\ phrase"
    r"|social\ security\ (?:number|no)|ssn"
    r"|passw[oö]rt(?:er)?|kennwort|mot\ de\ passe|contraseña|senha|palavra-passe|wachtwoord|lösenord|hasło|пароль|şifre"
)
_UNSPACED_NAMES = r"密码|密碼|パスワード|暗証番号|비밀번호"
_SENTENCE = regex.compile(
    rf"""
    (?: \b(?:{_NAMES})\b (?:\ (?:for|to|of|on|at|in|für|de|du|para|per|del|do)\ [^.!?\n]{{1,40}}?)?
        ["']? (?:\ ?[=:] | 's\ | \ (?:is|are|was|ist|lautet|est|es|è|é|jest|är|on|это)\b ) \s{{0,4}} \S
      | \b(?:{_NAMES}) [\ "'“`]{{1,3}} (?=\S{{0,40}}\d)\S{{4}}
      | \b(?:set|reset|chang(?:e|ed|ing)|updated?)\ (?:[\p{{L}}'-]{{1,20}}\ ){{0,3}}(?:{_NAMES})
        \ (?:(?:for|of|on)\ [^.!?\n]{{1,40}}?\ )?to\ \S
      | \bpass (?:\ ?[=:] | \ is) \s{{0,4}} (?=\S{{0,40}}\d) \S{{5}}
      | (?:is|was|are)\ (?:my|our|the|his|her)\ (?:[\p{{L}}-]{{1,20}}\ ){{0,3}}(?:{_NAMES})\b
      | (?:{_UNSPACED_NAMES})\s?(?:是|为|為|は|:|：|=|은|는)\s?\S
    )
    """,
    regex.I | regex.X,
)
_ASSIGNED = regex.compile(
    rf"""
    (?: (?:{_NAMES}) [\w-]{{0,20}} ["']? \s{{0,4}} (?:=>?|:) \s{{0,4}} ["'] [^"'\s]{{4}} )
    """,
    regex.I | regex.X,
)
_VARIABLE = regex.compile(
    r"^(?:export )?[A-Z0-9_]{0,40}(?:PASSWORD|PASSWD|(?<![A-Z0-9])(?:PASS|PWD)(?==)|SECRET|TOKEN|API_?KEY|PRIVATE_KEY)"
    r"[A-Z0-9_]{0,20}=[^\s$]{4}",
    regex.M,
)
_ISSUED = regex.compile(
    r"""
      -----BEGIN\ [A-Z0-9\ ]{0,40}PRIVATE\ KEY
    | \b(?: sk-[\w-]{16} | gh[pousr]_[A-Za-z0-9]{20} | github_pat_\w{20} | glpat-[\w-]{16} | hf_[A-Za-z0-9]{20}
      | AKIA[0-9A-Z]{16} | AIza[\w-]{30} | xox[abprs]-[\w-]{10} | npm_[A-Za-z0-9]{30} | (?:sk|rk)_live_[A-Za-z0-9]{16}
      | eyJ[\w-]{10,2000}\.eyJ[\w-]{10} )
    | \b[Bb]earer\ [\w.~+/-]{0,40}(?:\d|[._~+/])[\w.~+/-]{12}
    | \b[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{1,100}:(?!(?:pass(?:word)?|pw|secret|changeme|x+|\*+|\.+)@|[<$\{])[^\s/@]{4,100}@
    """,
    regex.X,
)
_CARD = regex.compile(r"(?<![\p{Nd}.,-])[2-6](?:[ -]?[0-9]){12,18}(?!\p{Nd})")


def are_in(text: str) -> bool:
    """Whether a sentence, or a few, tells one."""
    said = text.replace("’", "'")
    return _SENTENCE.search(said) is not None or identity_numbers.are_told(said) or are_in_document(text)


def are_in_document(text: str) -> bool:
    """Whether a long text or code has one; that it speaks of passwords does not count."""
    if any(pattern.search(text) for pattern in (_ASSIGNED, _VARIABLE, _ISSUED)) or identity_numbers.has_iban(text):
        return True
    return any(_has_check_digit(match[0]) for match in _CARD.finditer(text))


def _has_check_digit(number: str) -> bool:
    """Luhn's: every second digit from the right is doubled, with its own digits added up; the sum ends in 0."""
    digits = [int(char) for char in reversed(number) if char.isdigit()]
    return sum(digits[::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0
