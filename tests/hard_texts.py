"""Texts on which tokenizers go wrong."""

from __future__ import annotations

from hypothesis import strategies as st

_CODE = '''def f(x: int = 0) -> "str":
    """Doc."""
\treturn f"{x!r:>10}" if x >= 1e-3 else None  # done

class A: pass\r\n'''

HARD_TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "a  b   c    d     e",
    *(" " * n for n in (2, 3, 7, 15, 16, 17, 40)),
    *("\n" * n for n in (1, 2, 3, 9)),
    *("\t" * n for n in (1, 2, 5)),
    "line\nline\r\nline\rline\n\n\r\n  \n end",
    " \n \n\t \n",
    _CODE,
    "for(int i=0;i<10;++i){a[i]=~b[i]^0xFF;}//ok/*x*/",
    "https://example.org/a/b?c=d&e=%20f#g",
    "0 12 345 6789 12345678901234567890 3.14159 1,000,000 1e-10",
    "²³ ½ Ⅷ ١٢٣ १२३ 𝟘𝟙",
    "I'm you're he'll they've we'd it's DON'T I'LL 'tis 'S 'ſ rock'n'roll",
    "naïve café Ångström e\u0301 A\u030a ﬁ ß ẞ ſ İ ı ǅ",
    "\u0301lone \u0301\u0302\u0303 marks",
    "中文字符，日本語のテキスト。한국어 텍스트 漢字かな交じり",
    "العَرَبِيَّة نصٌّ مُشَكَّل ١٢٣؟ עִבְרִית",
    "ไทยไม่มีช่องว่าง हिन्दी ქართული",
    "😀👍🏽👨\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈🇩🇪🇫🇷 ☃\ufe0f",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b\x1f\x7f\x80\x85\x9f",
    "nul\x00in\x00side",
    "\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000 blanks \u200b\u200c\u200d\u2060\ufeff",
    "\ue000\uf8ff\U000f0000\U0010fffd private",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀 \U0001f9ff\U00020000",
    "▁ already ▁▁escaped▁",
    "a" * 300,
    "ha" * 100,
    "aab" * 50,
    "=-" * 40,
    "!?…—–«»„“”‘’·•",
    "/" * 9 + "\n" + "#" * 12 + "\n\n",
    "<|im_start|>user\n<s></s>[INST]<|eot_id|><|end|> <unk>",
    "<0x0A> <0x41>",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone15 GPT4all",
    "$100 €50 £3 + - = ~ ^ ` | \\ @ & % #",
]

_PIECES = st.sampled_from([piece for text in HARD_TEXTS for piece in (text[:12], text[-3:]) if piece])
_ANY = st.characters(exclude_categories=["Cs"])
RANDOM_TEXT = st.lists(_PIECES | st.text(_ANY, max_size=6) | st.sampled_from(" \n\t'aA1é"), max_size=12).map("".join)
