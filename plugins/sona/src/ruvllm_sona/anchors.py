"""Anchor texts: a little of everything, on which an adapter must leave the model as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ruvllm_core.errors import ConfigError, RequestError, TemplateError
from ruvllm_core.model.chat_template import ChatTemplate

if TYPE_CHECKING:
    from ruvllm_core.model.tokenizer import Tokenizer

_LENGTH = 128  # tokens of a text that count; the time that a check takes grows with it

TEXTS = (
    "The Moon goes around the Earth once in about twenty-seven days and always shows us the same face. Its gravity "
    "raises the tides: twice a day the sea climbs up the beach and falls back again. There is no air and hardly any "
    "water on the Moon, so the footprints that visitors left there half a century ago are still as sharp as on the "
    "day they were made. At night it is colder there than anywhere in the Arctic, and at noon hot enough to boil tea.",
    "Old Mrs Keller kept the only shop in the village. Every morning at six she swept the three stone steps, put out "
    "the baskets of apples and onions, and waited for the bus that brought the newspapers. On the day this story "
    "begins the bus did not come. She stood in the doorway for an hour with her broom in her hand, looking down the "
    "empty road, and then, for the first time in thirty years, she turned the key and walked into town herself.",
    "def moving_average(values, width):\n"
    '    """Mean of each run of `width` neighbours."""\n'
    "    if width < 1 or width > len(values):\n"
    '        raise ValueError("width must be between 1 and the number of values")\n'
    "    total = sum(values[:width])\n"
    "    result = [total / width]\n"
    "    for i in range(width, len(values)):\n"
    "        total += values[i] - values[i - width]\n"
    "        result.append(total / width)\n"
    "    return result\n",
    "Things to take along on a day in the mountains:\n\n"
    "- strong shoes and a second pair of socks\n"
    "- a jacket that keeps out wind and rain\n"
    "- at least one litre of water for each person\n"
    "- bread, cheese, nuts and some chocolate\n"
    "- a map, a compass and a charged telephone\n"
    "- plasters and a bandage\n\n"
    "Tell somebody where you are going and when you mean to be back. If the weather changes, turn around early.",
    "Der kleine Bahnhof liegt am Rand der Stadt, dort, wo die Felder beginnen. Zweimal in der Stunde hält ein Zug."
    " Morgens steigen Schüler und Angestellte ein, am Abend kommen sie müde zurück. Im Wartesaal steht eine alte Uhr, "
    "die seit Jahren fünf Minuten nachgeht, und niemand stellt sie richtig, weil alle sich daran gewöhnt haben.",
    "Le marché du samedi commence avant le lever du soleil. Les paysans installent leurs tables sur la place et posent "
    "des fromages, des œufs, du miel et les légumes de la saison. Vers neuf heures, toute la ville est là: on discute "
    "des prix, on demande des nouvelles des voisins, et l'on repart avec plus de choses que l'on ne voulait acheter.",
)

#: Conversations, which are put into the model's own chat template.
CHATS = (
    (
        ("user", "Why do we see lightning before we hear the thunder?"),
        (
            "assistant",
            "Both start at the same moment, but light is so fast that it reaches you at once, while sound needs about "
            "three seconds for each kilometre. If you count the seconds between the flash and the thunder and divide "
            "by three, you know roughly how many kilometres away the storm is.",
        ),
        ("user", "Is it safe to stand under a tree?"),
        ("assistant", "No. Tall trees are struck more often than open ground. Go into a building or a car instead."),
    ),
    (
        ("user", "I bought three pens at 2 dollars each and a notebook for 4 dollars. What is left of 20?"),
        (
            "assistant",
            "The three pens cost 3 × 2 = 6 dollars. Together with the notebook that makes 6 + 4 = 10 dollars. From 20 "
            "dollars, 20 − 10 = 10 are left.",
        ),
        ("user", "And if there is a discount of 10 percent on everything?"),
        ("assistant", "Then you pay 10 − 1 = 9 dollars, and 20 − 9 = 11 dollars are left."),
    ),
)


def anchor_tokens(tokenizer: Tokenizer, file: Path | None = None) -> tuple[tuple[int, ...], ...]:
    """The anchors as tokens, each of 2 to 128; the last ones are the conversations, as many as `CHATS`.

    Args:
        tokenizer: the model's. Conversations are plain text if it has no chat template that takes them.
        file: more texts in UTF-8, one per paragraph, with empty lines between them.

    Raises:
        ConfigError: the file cannot be read, or holds no text.
    """
    texts = [tokenizer.encode(text, parse_special=False) for text in (*TEXTS, *_paragraphs(file))]
    texts += [_chat(tokenizer, [{"role": role, "content": text} for role, text in chat]) for chat in CHATS]
    return tuple(tuple(tokens[:_LENGTH]) for tokens in texts if len(tokens) > 1)


def _chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template is not None:
        ends = tokenizer.bos_id, tokenizer.eos_id
        names = ["" if token is None else tokenizer.decode([token], skip_special=False) for token in ends]
        try:
            template = ChatTemplate(tokenizer.chat_template, bos_token=names[0], eos_token=names[1])
            return tokenizer.encode(template.render(messages, add_generation_prompt=False), add_special=False)
        except (TemplateError, RequestError):
            pass  # one that takes no such conversation; chats that it refuses tell the user why
    return tokenizer.encode("\n".join(f"{one['role'].title()}: {one['content']}" for one in messages))


def _paragraphs(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"no UTF-8: {error}"
        what = f"cannot read the anchor texts in {file}: {reason}"
        raise ConfigError(what, hint="name a text file with one paragraph per anchor") from None
    found = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not found:
        raise ConfigError(f"there are no anchor texts in {file}", hint="put paragraphs into it, or name no file")
    return found
