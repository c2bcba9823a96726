"""Limits of the Gopher rules by script and language of a text.

The paper has limits for English. FineWeb-2 (Penedo et al. 2025, https://arxiv.org/abs/2506.20920) fits the same rules
to each of its languages; its thresholds are in https://github.com/huggingface/fineweb-2/tree/main/configs.
`WORD_LENGTH` and `CHARACTER_LIMITS` are approximately the widest thresholds of the larger languages of a script. The
stop words are function words of each language, like the eight English ones of the paper; words that are also frequent
in English or in code are excluded. The Universal Declaration of Human Rights, in chunks of seven paragraphs, passes in
nearly all of these languages and scripts.

The script of a text is that of most of its letters. Its language is the language of that script with the most stop
words in the text; a text in Latin script with at least two English stop words is English, as in the paper.
"""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache

from tunery.spec import AUTO, GopherRules

STOP_WORDS_MIN = 2
"""As in the paper and, for all languages, in FineWeb-2."""

ENGLISH = {
    "mean_word_min": 3.0,
    "mean_word_max": 10.0,
    "top_2gram_max": 0.2,
    "top_3gram_max": 0.18,
    "top_4gram_max": 0.16,
    "duplicate_5grams_max": 0.15,
    "duplicate_6grams_max": 0.14,
    "duplicate_7grams_max": 0.13,
    "duplicate_8grams_max": 0.12,
    "duplicate_9grams_max": 0.11,
    "duplicate_10grams_max": 0.1,
}
"""The limits of the paper."""

CHARACTER_LIMITS = {
    "top_2gram_max": 0.26,
    "top_3gram_max": 0.21,
    "top_4gram_max": 0.18,
    "duplicate_5grams_max": 0.25,
    "duplicate_6grams_max": 0.23,
    "duplicate_7grams_max": 0.21,
    "duplicate_8grams_max": 0.19,
    "duplicate_9grams_max": 0.18,
    "duplicate_10grams_max": 0.16,
}
"""For scripts in which each character is a word: n characters carry less information than n words, so they repeat more
often."""

WORD_LENGTH = {
    "Han": (1, 5),
    "Kana": (1, 6),
    "Hangul": (2, 8),  # FineWeb-2 counts morphemes there, we words
    "Thai": (2, 10),
    "Lao": (2, 10),
    "Khmer": (2, 13),
    "Myanmar": (2, 21),
    "Tibetan": (1, 23),
    "Devanagari": (2, 21),
    "Bengali": (2, 24),
    "Gurmukhi": (2, 19),
    "Gujarati": (2, 22),
    "Oriya": (2, 30),
    "Sinhala": (2, 30),
    "Tamil": (3, 37),
    "Telugu": (3, 37),
    "Kannada": (3, 37),
    "Malayalam": (3, 37),
    "Arabic": (2, 12),  # of Arabic and Persian; vowel signs, where they are written, count
    "Hebrew": (2, 12),
    "Cyrillic": (3, 12),
    "Greek": (3, 12),
    "Armenian": (3, 12),
    "Georgian": (3, 13),
    "Ethiopic": (1, 24),
}
"""Minimum and maximum of the mean number of characters per word (code points, including vowel signs and
punctuation)."""
OTHER_LATIN = (2, 15)
"""Covers German (15), Finnish (14), French (2..11) and others."""

STOP_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with",
        "de": "der und das ist nicht ein eine mit von für auf dem den sich auch werden",
        "fr": "le la les des et est une dans que pour qui sur par avec sont",
        "es": "el los las una que con para por como está este pero más son porque cada",
        "pt": "que não uma para por dos das como mais são pelo ou seu também",
        "it": "il che di una della con sono gli nel dei è anche delle degli questo",
        "nl": "het een van niet dat met voor zijn wordt ook deze aan bij naar ieder heeft",
        "sv": "och att det som för inte den med har är av ett eller",
        "da": "og det som ikke til af med har den eller ved kan er et",
        "no": "og det som ikke til av med har den eller ved kan er et på",
        "is": "og að það sem ekki til með fyrir hefur eða við er af rétt",
        "fi": "ja että joka tai myös sekä kun hän tämä ovat jos mutta sen kuin",
        "et": "ja või kui mis seda ning ka oma tema mitte kõik selle igal oli",
        "hu": "és hogy nem egy az meg vagy mint van minden csak ha kell joga",
        "pl": "nie się jest że jak lub przez oraz dla jego czy tak ma każdy",
        "cs": "že se na je nebo jako který aby jeho má být při své také ani",
        "sk": "že sa na je alebo ako ktorý aby jeho má byť pri svoje tiež ani",
        "sl": "je se na da za ki ali pri kot tudi svoje biti ne vsak ima vsakdo",
        "hr": "je se na da za koji ili kao od bi što svoje ima ne biti također",
        "ro": "și de la este pentru în sau din nu cu sunt ale prin orice fiecare unui",
        "sq": "dhe në të që për nga një me është ose ka nuk kjo çdo",
        "lt": "ir kad yra arba su ne kaip jo už bet turi į visi iš būti",
        "lv": "un kas ir vai ar nav kā lai uz tiesības ikvienam arī viņa ikviens būt nevar",
        "tr": "ve bir bu için ile olarak olan veya daha gibi hakkı da ne değil herkes",
        "az": "və bir bu üçün ilə olan ya kimi hər hüququ da ki etmək",
        "vi": "và của các có là được cho một trong không người những này hay với",
        "id": "yang dan di dengan untuk dari pada dalam adalah atau ini tidak setiap itu akan",
        "tl": "ang ng mga sa na ay kanyang hindi para bawat isang nang",
        "sw": "ya na kwa wa katika ni la kila cha haki yake kuwa hii hana huo",
        "ca": "els les una que amb dels són tota té dret aquest tots seva",
        "gl": "que unha con para por dos das como toda dereito ou súa ao calquera",
        "eu": "eta da du ez edo dute duen izan bere izango guztiek honen dira dituzte",
        "cy": "yn yr ac mae gan neu hawl pawb ei fod wedi dim hawliau",
        "ga": "na ar agus le gach nó ceart aige bhfuil chun ag uile tá dhuine níl seo",
        "eo": "la kaj de en ne estas por kun al ĉiu havas aŭ pri",
        "af": "van het en nie om te vir met ’n elke reg sy aan sal wat hulle",
        "ha": "da ya na wani yana kowa ko cikin kuma ga ba domin",
        "yo": "ní ti sí àwọn ó láti tí àti kan gbogbo jẹ́ ẹnì",
        "zu": "ukuthi futhi noma unelungelo kanye wonke uma ngoba umuntu kufanele yakhe lokho",
        "uz": "va bir bu uchun bilan har huquqiga yoki ega o‘z emas bo‘lgan kerak",
        "ht": "ki yon pou ak yo gen tout moun dwa li sou pa chak",
        "zh": "的 是 在 了 和 有 不 一 這 这 為 为 人 以 與 与 也 就 于 於 或 可",
        "yue": "嘅 係 唔 喺 同 有 佢 咗 呢 人 都 嚟 或 一",
        "ja": "の に を は た が で て と し も な れ る",
        "ko": "이 그 수 및 것 또는 있는 있다 하는 모든 등 대한 위한 같은 더 한 때",
        "th": "ที่ และ ของ ใน การ เป็น มี ได้ ให้ จะ ไม่ หรือ กับ โดย จาก นี้",
        "lo": "ແລະ ໃນ ຂອງ ເປັນ ທີ່ ໄດ້ ມີ ຈະ ບໍ່ ຫຼື ກັບ ໃຫ້ ນີ້ ການ",
        "km": "និង ជា ដែល មាន នៅ ក្នុង ការ បាន ឬ ពី នៃ ដោយ នេះ របស់",
        "my": "သည် ကို နှင့် တွင် များ ၏ သော မှ ဖြစ် ရှိ ခြင်း မ ၌ က",
        "bo": "དང ལ གི ཀྱི ནས ནི དུ གྱི ས པ མ ཡིན ཡོད ར",
        "hi": "के में है की और से का को एक हैं पर ने यह भी नहीं या",
        "mr": "आहे आणि हे व या एक ते हा आहेत किंवा नाही तर की ही",
        "ne": "र छ हो एक पनि मा यो गर्न को लाई वा हुन्छ छन् प्रत्येक",
        "bn": "এবং ও হয় এই করে একটি জন্য না থেকে বা যে তার প্রত্যেকের সঙ্গে",
        "as": "আৰু এই কৰা বা পৰা এটা হয় যে কৰে তেওঁৰ প্ৰত্যেক নহয়",
        "pa": "ਵਿੱਚ ਦੇ ਹੈ ਅਤੇ ਦੀ ਨੂੰ ਦਾ ਇੱਕ ਤੋਂ ਨੇ ਹਨ ਲਈ ਜਾਂ ਵਿਚ ਇਕ",
        "gu": "છે અને આ એક તે કે પણ માટે પર નથી અથવા હોય તેના દરેક",
        "or": "ଓ ଏହି ଏକ ଏବଂ ପାଇଁ ମଧ୍ୟ କି ଏହା ନାହିଁ କରି ତାହା ପରେ",
        "ta": "மற்றும் ஒரு இந்த இது என்ற அல்லது என்று உள்ள அந்த முதல் எந்த தம் அவர்கள்"
        " எல்லா ஒவ்வொரு வேண்டும் பற்றி தமது ஆகும் ஆனால் போன்ற மேலும் இல்லை தனது",
        "te": "మరియు ఒక ఈ ఉంది కు ప్రతి లేదా ఆ అని నుండి కూడా తన లేక యొక్క గల ఏ కోసం చేసే ఇది అది",
        "kn": "ಮತ್ತು ಈ ಒಂದು ಎಂದು ಅಥವಾ ಇದು ಆ ಪ್ರತಿಯೊಬ್ಬ ತನ್ನ ಯಾವುದೇ ಮೇಲೆ ಎಲ್ಲ ಹಾಗೂ ತಮ್ಮ ಎಲ್ಲಾ ಯಾವ ಇದೆ ಅದು",
        "ml": "ഒരു ഈ എന്ന ഇത് ആണ് അല്ലെങ്കിൽ കൂടാതെ ഏതൊരു എല്ലാ തന്റെ ഉള്ള ആ അവരുടെ യാതൊരു"
        " നിന്നും വേണ്ടി പറ്റി ഉണ്ട് അത് അവർ ചെയ്യുന്ന ഇല്ല ഏതൊരാള്‍ക്കും എല്ലാവര്‍ക്കും",
        "si": "සහ හා වන මෙම සඳහා ද වූ ඇත හෝ බව එක් ඒ මේ සෑම",
        "ar": "في من على إلى أن مع أو هو عن التي كل ما هذا لا",
        "fa": "در و به از که است این را با یک هر یا برای آن",
        "ur": "کے میں کی اور ہے سے کا نے اس پر کو ایک یا جو",
        "ps": "د په او له چې سره يا دی لري هر کې ته څخه یې",
        "ckb": "و لە بە بۆ کە ئەو هەموو لەگەڵ یان ئەم هەر نییە",
        "ug": "ۋە بۇ بىر بىلەن ئۈچۈن ھەر ياكى شۇ بولۇش ئۇ",
        "sd": "۽ جي ۾ کي جو آهي سان هر يا کان جا ته",
        "he": "של את על הוא עם גם לא או כל זה היא אם אשר כי",
        "yi": "און אַ פון צו איז די אין דער האָט מיט אויף זיין",
        "ru": "и в на не с что как по это из для или быть к его",
        "uk": "і в на не з що як до та це для або має його",
        "be": "і ў на не з што як да або для яго мае гэта",
        "bg": "на и в да се от за не с или е по като има",
        "sr": "и у на је да се за не са или од има као који",
        "mk": "и во на да се од за не со или е има како секој",
        "kk": "және бір бұл мен үшін әр немесе құқығы ол бар осы да",
        "ky": "жана бир бул менен үчүн ар же укугу ал бар ошол да",
        "tg": "ва дар ба аз ки ин бо ё ҳар дорад барои ҳуқуқ",
        "tt": "һәм бу белән өчен бер һәр яки ул хокукы да кеше булырга",
        "mn": "ба нь энэ бол эрхтэй юм буюу бүр хүн байх өөрийн нэг",
        "tk": "bir bu bilen üçin hem ýa öz deň hiç bolan bolup",
        "sa": "च वा न अपि हि सह इति तु एव यत्र कृते",
        "pnb": "تے دا دے دی وچ نوں توں یا نال وی کسے ہر",
        "os": "ӕмӕ дӕр алы ис йӕ хъуамӕ ацы сӕ куыд сты",
        "sah": "уонна да бу эбэтэр хас ханнык суох кини буолар ол",
        "tyv": "болгаш база азы биле даа ооң бүгү бо чок турар",
        "ba": "һәм был менән өсөн бер һәр йәки ул булырға үҙ",
        "cv": "тата та пур тӑвас мар вӑл ҫын хӑйӗн пурте ӑна",
        "el": "και το της του να η την από με για που είναι δεν ή καὶ τὸ τῆς τοῦ νὰ τὴν ἀπὸ μὲ γιὰ ποὺ εἶναι δὲν ἢ",
        "hy": "և է են որ իր ունի կամ այդ մեջ չի պետք համար յուրաքանչյուր ոչ",
        "ka": "და რომ არის არ ან ეს თუ მისი უნდა აქვს ყველა ამ",
        "am": "እና ነው ላይ ውስጥ ወደ እንደ ግን ይህ ወይም ሁሉ ለ መብት አለው ማንኛውም",
        "ti": "እዩ ናይ ካብ ኣብ ከም እዚ ወይ ን መሰል ሰብ ኣለዎ ነፍሲ",
    }.items()
}

_SCRIPT_LANGUAGES = {
    "Han": "zh yue",
    "Kana": "ja",
    "Hangul": "ko",
    "Thai": "th",
    "Lao": "lo",
    "Khmer": "km",
    "Myanmar": "my",
    "Tibetan": "bo",
    "Devanagari": "hi mr ne sa",
    "Bengali": "bn as",
    "Gurmukhi": "pa",
    "Gujarati": "gu",
    "Oriya": "or",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Sinhala": "si",
    "Arabic": "ar fa ur pnb ps ckb ug sd",
    "Hebrew": "he yi",
    "Cyrillic": "ru uk be bg sr mk kk ky tg tt ba cv sah tyv os mn",
    "Greek": "el",
    "Armenian": "hy",
    "Georgian": "ka",
    "Ethiopic": "am ti",
}
LANGUAGES = {script: tuple(languages.split()) for script, languages in _SCRIPT_LANGUAGES.items()}
LANGUAGES["Latin"] = tuple(sorted(STOP_WORDS.keys() - {one for some in LANGUAGES.values() for one in some} - {"en"}))
"""Languages whose stop words are known, by script; in Latin letters besides English."""


def language_and_stop_words(script: str, words: Set[str]) -> tuple[str, int]:
    """Return the language of a text in a script ("" if no language of the script is known), and the number of its stop
    words in `words`, the distinct lower-case words of the text without punctuation."""
    if script == "Latin":
        english = len(STOP_WORDS["en"] & words)
        if english >= STOP_WORDS_MIN:
            return "en", english
    counts = {language: len(STOP_WORDS[language] & words) for language in LANGUAGES.get(script, ())}
    if script == "Latin":
        counts = {"en": english} | {language: count for language, count in counts.items() if count >= STOP_WORDS_MIN}
    language = max(counts, key=counts.__getitem__, default="")
    return language, counts.get(language, 0)


@lru_cache(maxsize=1024)
def limits(rules: GopherRules, script: str, language: str) -> dict[str, float | None]:
    """Return the limits by rule name, with `auto` resolved to a number or None (no limit)."""
    automatic: dict[str, float | None] = {**ENGLISH, "stop_words_min": STOP_WORDS_MIN if language else None}
    if script in ("Han", "Kana"):
        automatic |= CHARACTER_LIMITS
    if language != "en":
        unknown = OTHER_LATIN if script == "Latin" else (None, None)
        automatic["mean_word_min"], automatic["mean_word_max"] = WORD_LENGTH.get(script, unknown)
    given = {
        "words_min": rules.words_min,
        "words_max": rules.words_max,
        "mean_word_min": rules.mean_word_min,
        "mean_word_max": rules.mean_word_max,
        "hashes_max": rules.hashes_max,
        "ellipses_max": rules.ellipses_max,
        "bullet_lines_max": rules.bullet_lines_max,
        "ellipsis_lines_max": rules.ellipsis_lines_max,
        "alphabetic_words_min": rules.alphabetic_words_min,
        "stop_words_min": rules.stop_words_min,
        "duplicate_lines_max": rules.duplicate_lines_max,
        "duplicate_paragraphs_max": rules.duplicate_paragraphs_max,
        "duplicate_line_chars_max": rules.duplicate_line_chars_max,
        "duplicate_paragraph_chars_max": rules.duplicate_paragraph_chars_max,
        "top_2gram_max": rules.top_2gram_max,
        "top_3gram_max": rules.top_3gram_max,
        "top_4gram_max": rules.top_4gram_max,
        "duplicate_5grams_max": rules.duplicate_5grams_max,
        "duplicate_6grams_max": rules.duplicate_6grams_max,
        "duplicate_7grams_max": rules.duplicate_7grams_max,
        "duplicate_8grams_max": rules.duplicate_8grams_max,
        "duplicate_9grams_max": rules.duplicate_9grams_max,
        "duplicate_10grams_max": rules.duplicate_10grams_max,
    }
    return {rule: automatic[rule] if limit == AUTO else limit for rule, limit in given.items()}
