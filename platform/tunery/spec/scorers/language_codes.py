"""ISO 639 codes of the languages that the scorer `language` detects, macrolanguages, and other names."""

from __future__ import annotations

import difflib
import re

_CODES = """
ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga
gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij
ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so
sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu
"""
LANGUAGES = tuple(_CODES.split())
"""ISO 639 codes that the detector knows."""
MACROLANGUAGES = {
    "ar": ("ar", "ary", "arz"),  # Moroccan and Egyptian Arabic
    "bik": ("bcl",),
    "ff": ("fuv",),
    "gn": ("gug",),
    "hbs": ("bs", "hr", "sr"),  # Serbo-Croatian: Bosnian, Croatian, Serbian
    "kok": ("gom",),
    "ku": ("ku", "sdh"),
    "lv": ("lv", "ltg"),  # with Latgalian
    "ms": ("ms", "id"),  # with Indonesian
    "nb": ("no",),  # no macrolanguage: the detector's "no" is Bokmål
    "no": ("no", "nn"),  # Bokmål and Nynorsk
    "uz": ("uz", "uzs"),
    "zh": ("zh", "wuu", "yue"),  # with Wu and Cantonese
}
"""Members of the macrolanguages of ISO 639-3 (https://iso639-3.sil.org/about/scope) that the detector knows."""
_OTHER_NAMES = {
    name: code
    for code, names in {
        "ar": "arabic ara arb",
        "de": "german deu ger",
        "en": "english eng",
        "es": "spanish spa",
        "fa": "persian farsi fas",
        "fr": "french fra fre",
        "hbs": "sh serbo-croatian",
        "hi": "hindi hin",
        "id": "indonesian ind in",
        "it": "italian ita",
        "ja": "japanese jpn jp",
        "ko": "korean kor kr",
        "ms": "malay msa",
        "nb": "nob",
        "nn": "nno",
        "no": "norwegian nor",
        "pt": "portuguese por",
        "ru": "russian rus",
        "th": "thai tha",
        "tr": "turkish tur",
        "uk": "ukrainian ukr ua",
        "vi": "vietnamese vie vn",
        "yue": "cantonese",
        "zh": "chinese mandarin zho cmn cn",
    }.items()
    for name in names.split()
}
"""Code by other names and codes of a language."""


def similar_codes(name: str) -> list[str]:
    """Return the known code that `name` is another name of (`zh-CN`, `german`, `deu`), else up to three codes with a
    similar spelling."""
    known = sorted({*LANGUAGES, *MACROLANGUAGES})
    lower = name.lower()
    base = re.split("[-_]", lower)[0]  # zh-CN, en_US
    by_name = [code for code in (_OTHER_NAMES.get(lower), _OTHER_NAMES.get(base), base) if code in known][:1]
    return by_name or difflib.get_close_matches(lower, known, n=3, cutoff=0.5)
