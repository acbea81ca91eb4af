"""The data of the `offline` suite, made from a seed: they need no download, and are the same on every machine.

`capitals` asks for what a pretrained model of any size has read, `sums` for arithmetic it has practised, `echo` for
words it has just seen. A merge that broke its parents' circuits loses the first two slowly and the last one at once.
"""

from __future__ import annotations

import random
from typing import Any

SEED = 20
SUMS, ECHOES = 120, 60

_CAPITALS = """
France Paris|Italy Rome|Spain Madrid|Germany Berlin|Portugal Lisbon|Austria Vienna|Greece Athens|Poland Warsaw
Hungary Budapest|Ireland Dublin|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Iceland Reykjavik
Belgium Brussels|the Netherlands Amsterdam|Switzerland Bern|Romania Bucharest|Bulgaria Sofia|Serbia Belgrade
Croatia Zagreb|Ukraine Kyiv|Russia Moscow|Turkey Ankara|Egypt Cairo|Morocco Rabat|Tunisia Tunis|Kenya Nairobi
Nigeria Abuja|Ghana Accra|Senegal Dakar|Ethiopia Addis Ababa|Uganda Kampala|Zimbabwe Harare|Zambia Lusaka
Iran Tehran|Iraq Baghdad|Israel Jerusalem|Lebanon Beirut|Jordan Amman|Qatar Doha|India New Delhi|Pakistan Islamabad
Nepal Kathmandu|Bangladesh Dhaka|Thailand Bangkok|Vietnam Hanoi|Malaysia Kuala Lumpur|Indonesia Jakarta
the Philippines Manila|China Beijing|Japan Tokyo|South Korea Seoul|Mongolia Ulaanbaatar|Australia Canberra
New Zealand Wellington|Canada Ottawa|Mexico Mexico City|Cuba Havana|Jamaica Kingston|Colombia Bogota|Peru Lima
Chile Santiago|Argentina Buenos Aires|Uruguay Montevideo|Ecuador Quito|Venezuela Caracas|Cambodia Phnom Penh
Estonia Tallinn|Latvia Riga|Lithuania Vilnius|Slovakia Bratislava|Slovenia Ljubljana|Albania Tirana|Armenia Yerevan
"""
_TWO_WORDS = ("Addis Ababa", "New Delhi", "Kuala Lumpur", "Mexico City", "Buenos Aires", "Phnom Penh")
_WORDS = (
    "apple", "river", "stone", "window", "garden", "silver", "music", "winter", "bridge", "letter", "orange", "forest",
    "yellow", "market", "island", "candle", "mirror", "pepper", "rabbit", "summer", "castle", "engine", "flower",
    "hammer",
)  # fmt: skip


def capitals(**_: Any) -> Any:
    """One question a country; the wrong answers are other capitals."""
    rng = random.Random(SEED)
    pairs = [_pair(text) for line in _CAPITALS.strip().splitlines() for text in line.split("|")]
    cities = [city for _, city in pairs]
    rows = []
    for country, city in pairs:
        choices = [city, *rng.sample([other for other in cities if other != city], 3)]
        rng.shuffle(choices)
        rows.append({"prompt": f"The capital of {country} is", "choices": choices, "answer": choices.index(city)})
    return _splits(rows)


def _pair(text: str) -> tuple[str, str]:
    city = next((name for name in _TWO_WORDS if text.endswith(name)), text.rpartition(" ")[2])
    return text.removesuffix(f" {city}"), city


def sums(**_: Any) -> Any:
    """Two numbers below 100; the wrong answers differ by 1, 2 or 10. The first rows are examples."""
    rng = random.Random(SEED + 1)
    rows = []
    for _number in range(SUMS + 4):
        first, second = rng.randint(11, 99), rng.randint(11, 99)
        total = first + second
        choices = [total, *(total + off for off in rng.sample((-10, -2, -1, 1, 2, 10), 3))]
        rng.shuffle(choices)
        rows.append(
            {"prompt": f"{first} + {second} =", "choices": [str(each) for each in choices],
             "answer": choices.index(total)}
        )  # fmt: skip
    return _splits(rows[4:], rows[:4])


def echo(**_: Any) -> Any:
    """Five words to be written again. The first rows are examples."""
    rng = random.Random(SEED + 2)
    rows = [{"words": " ".join(rng.sample(_WORDS, 5))} for _ in range(ECHOES + 2)]
    return _splits(rows[2:], rows[:2])


def _splits(test: list[dict[str, Any]], examples: list[dict[str, Any]] | None = None) -> Any:
    import datasets

    made = {"test": datasets.Dataset.from_list(test)}
    if examples:
        made["train"] = datasets.Dataset.from_list(examples)
    return datasets.DatasetDict(made)
