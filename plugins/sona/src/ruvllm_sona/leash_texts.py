"""Texts that nobody asked for and nobody rated: in every step of learning, a piece of one is on the leash.

An answer's own leash keeps the model near to itself where the user is; what an adapter does to other text it does not
see. These are of many kinds, and none of them is an anchor of the gate, which must judge by texts not learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ruvllm_sona.records import Example

if TYPE_CHECKING:
    from ruvllm_core.model.tokenizer import Tokenizer

PIECE = 48  # tokens of a text in one step; a step takes longer by about half with them

TEXTS = (
    "The canal was dug in eleven years by some four thousand men, most of whom had never held a spade before. When "
    "it was opened in 1829 it joined two rivers, and grain that had taken nine days by cart reached the harbour in "
    "two. Forty years later the railway came. The last barge passed the upper lock in the autumn of 1921, and since "
    "then the water has belonged to herons, anglers and, on Sunday afternoons, to families in rented rowing boats.",
    "A queue is a collection in which the element that was added first is removed first. The method push() adds an "
    "element at the end and returns nothing; pop() removes the first element and returns it. If the queue is empty, "
    "pop() raises an exception of type EmptyError. Both take constant time. An optional argument, capacity, limits "
    "the number of elements: when the limit has been reached, push() waits until another thread removes one. Changed "
    "in version 2.4: the argument timeout was added. See also: stack, priority queue.",
    "To make the dough, mix 500 g of flour with 7 g of salt and 4 g of dry yeast. Add 330 ml of lukewarm water and "
    "stir until no dry flour is left. Cover the bowl and leave it for twelve hours. Heat the oven to 240 °C with a "
    "heavy pot inside. Fold the dough twice, put it into the hot pot, close the lid and bake for thirty minutes; "
    "then take the lid off and bake for another fifteen, until the crust is dark brown. Let it cool before you cut "
    "it.",
    "HARBOUR BRIDGE TO CLOSE FOR REPAIRS. The city council said on Tuesday that the bridge will be closed to cars "
    "from the first of March to the end of June. Engineers found rust in nine of its forty cables last autumn. Buses "
    "will use the tunnel, and a ferry for cyclists and pedestrians is to run every ten minutes. The work is expected "
    "to cost 6.2 million, about a third more than was planned. Shop owners on both sides fear for their trade.",
    "3. The tenant pays the rent in advance, on or before the third working day of each month. 4. Repairs that "
    "become necessary through ordinary use are paid for by the landlord, unless the damage was not reported within a "
    "reasonable time. 5. Either party may end this agreement in writing, with notice of three months. The right to "
    "end it without notice for a serious reason is not affected. 6. Should one of these provisions be void, the "
    "others remain in force.",
    "#include <stdio.h>\n\n"
    "/* Prints the prime factors of n, smallest first. */\n"
    "static void factor(unsigned long n)\n{\n"
    "    for (unsigned long p = 2; p * p <= n; p++) {\n"
    "        while (n % p == 0) {\n"
    '            printf("%lu ", p);\n            n /= p;\n'
    "        }\n    }\n    if (n > 1)\n"
    "        printf(\"%lu\", n);\n    putchar('\\n');\n}\n\n"
    "int main(void)\n{\n    factor(360);\n    factor(9973);\n"
    "    return 0;\n}\n",
    '{"order": 20418, "customer": {"name": "J. Okafor", "city": "Leeds"}, "items": [{"sku": "B-117", "title": "Desk '
    'lamp", "price": 39.5, "count": 1}, {"sku": "C-020", "title": "Light bulb, warm white", "price": 4.25, "count": '
    '3}], "shipping": {"method": "post", "cost": 5.0}, "paid": true, "notes": null}',
    "Let n be odd. Then there is an integer k with n = 2k + 1, and n² = 4k² + 4k + 1 = 4k(k + 1) + 1. One of two "
    "neighbouring integers is even, so k(k + 1) is divisible by 2 and 4k(k + 1) by 8. Hence the square of an odd "
    "number leaves the remainder 1 when it is divided by 8. It follows that a sum of three odd squares leaves the "
    "remainder 3 and is therefore never a square itself.",
    '"You are late," said the captain without looking up from the chart.\n\n"The road was under water, sir. We had '
    'to leave the horses at the mill."\n\n"And the letter?"\n\nTobias felt inside his coat. The paper was wet at the '
    "edges, but the seal had held. He laid it on the table next to the lamp, and nobody spoke. Outside, the wind had "
    "turned to the north again; the ropes beat against the mast like somebody knocking.",
    "Dear Ms Brandt, thank you for your letter of 14 May. We are sorry to hear that the second parcel arrived "
    "damaged. A replacement was sent today and should reach you by the end of the week; there is no need to return "
    "the broken cups. As a small apology we have enclosed a voucher, which is valid until December. Yours sincerely, "
    "Paul Aydin, Customer Service",
    "Red blood cells carry oxygen from the lungs to every part of the body. They are made in the marrow of the "
    "bones, live for about four months, and are taken apart in the spleen and the liver. A human adult has roughly "
    "twenty-five trillion of them. Since they have no nucleus, they cannot repair themselves or divide. The iron in "
    "their haemoglobin, which binds the oxygen and gives blood its colour, is used again for new cells.",
    "La biblioteca abre de lunes a viernes, de nueve a ocho, y los sábados hasta las dos. Para llevarse libros hace "
    "falta un carné, que es gratuito para los vecinos del barrio. Cada persona puede pedir prestados cinco libros "
    "durante tres semanas. En la segunda planta hay mesas para estudiar y, al fondo, una sala pequeña donde los "
    "jueves por la tarde se leen cuentos a los niños.",
    "Year\tRainfall (mm)\tMean temperature (°C)\n2015\t612\t10.4\n2016\t688\t10.1\n2017\t701\t9.9\n2018\t433\t11.2\n"
    "2019\t590\t10.8\n2020\t641\t11.0\n\nTable 2. Rainfall and temperature at the northern station. The dry summer "
    "of 2018 stands out: between June and August only 61 mm of rain fell, less than a third of the mean of the other "
    "years.",
    "What do we mean when we say that somebody knows a thing? Not merely that it is true and that he believes it, "
    "for one may believe the truth by accident, as a stopped clock is right twice a day. It seems that there must be "
    "some connection between the fact and the belief. But as soon as we try to say what kind of connection this is, "
    "examples turn up in which it is present, and which we should nevertheless hesitate to call knowledge.",
    "Q: My screen stays black after the update, what can I do?\nA: Hold the power button for ten seconds, then start "
    "again while pressing F8. Choose 'safe mode' from the menu. If the picture comes back, the driver is the "
    "problem: remove it, restart, and install the version from the manufacturer's page. If not, check the cable "
    "first. lol it really was the cable, thanks!!",
    "The old orchard on the hill, / where no one picks the apples now, / still keeps its promise every spring / and "
    "hangs its white on every bough. / The wall has fallen, and the gate / is held by ivy more than rust; / the path "
    "we took to school is gone / beneath the nettles and the dust.",
)


def leash_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The texts as tokens, each of 2 or more."""
    found = (tuple(tokenizer.encode(text, parse_special=False)) for text in TEXTS)
    return tuple(tokens for tokens in found if len(tokens) > 1)


def leash_piece(texts: Sequence[Sequence[int]], step: int) -> Example:
    """What is on the leash in a learner's step of this number: one text after the other, in each a piece further on."""
    round_, number = divmod(step, len(texts))
    text = texts[number]
    pieces = -(-(len(text) - 1) // PIECE)
    first = min(round_ % pieces * PIECE, max(len(text) - 1 - PIECE, 0))
    return Example("", tuple(text[first : first + 1]), tuple(text[first + 1 : first + 1 + PIECE]), 0.5, 1.0)
