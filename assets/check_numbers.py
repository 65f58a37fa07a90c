"""Recompute the measured numbers of README.md, RESULTS.md and TEACHING.md from the files here.

python assets/check_numbers.py

A claim is a piece of the text in which # stands for a number, and what was measured. It is right if
that rounds to the number. A line is printed for every number that is wrong, and for every claim
that stands nowhere or twice.
"""

import json
import re
import sys
from math import exp, isclose
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).parent
NUMBER = r"(?<![\w.])[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?[kM]?\b"
texts = {}  # of all files
here = None  # (file, begin, end) of the section that claims are about
compared = set()  # (file, begin, end) of numbers
wrong = []  # lines to print


def section(file, heading):
    """The claims that follow are about the text from this heading to the next."""
    global here
    text = texts.setdefault(file, (HERE.parent / file).read_text("utf-8"))
    begin = re.search(rf"^#+ {re.escape(heading)}$", text, re.M).end()
    end = re.compile(r"^#+ |\Z", re.M).search(text, begin).start()
    here = file, begin, end


def as_words(pattern):
    """An expression for a pattern, whatever white space stands between its words."""
    return re.sub(r"(\\\s)+", r"\\s+", re.escape(pattern))


def find(expression, pattern):
    """The one place in the section where the expression of a pattern matches, or None."""
    file, begin, end = here
    places = [*re.compile(expression, re.M).finditer(texts[file], begin, end)]
    if len(places) == 1:
        return places[0]
    wrong.append(f"{file}: stands there {len(places)} times: {pattern}")


def compare(words, spans, values):
    """Compare the numbers at these spans of the file with the values. words: around them."""
    file = here[0]
    words = " ".join(words.split())
    if len(spans) != len(values):
        wrong.append(f"{file}: {len(spans)} numbers, computed {len(values)}, in: {words}")
    for (begin, end), value in zip(spans, values):
        compared.add((file, begin, end))
        number = texts[file][begin:end]
        mantissa, _, power = number.replace(",", "").replace("−", "-").rstrip("kM").partition("e")
        unit = 10.0 ** int(power or 0) * {"k": 1e3, "M": 1e6}.get(number[-1], 1)
        last_digit = unit / 10 ** len(mantissa.partition(".")[2])
        if abs(float(mantissa) * unit - value) > last_digit * 0.500001:
            wrong.append(f"{file}: {number}, computed {value:.6g}, in: {words}")


def claim(pattern, *values):
    """The numbers of a pattern, each # of it, are these values."""
    place = find(as_words(pattern).replace(r"\#", f"({NUMBER})"), pattern)
    if place:
        compare(place[0], place.regs[1:], values)


def row(first, *values):
    """The numbers of a table's row, without those of its first cell or cells, are these values."""
    place = find(rf"^\| {as_words(first)} \|(.*)$", f"| {first} |")
    if place:
        numbers = re.compile(NUMBER).finditer(place.string, *place.span(1))
        compare(place[0], [number.span() for number in numbers], values)


def read(name):
    """A JSON file of this folder; of a .jsonl file, the list of its lines."""
    text = (HERE / name).read_text("utf-8")
    return [*map(json.loads, text.splitlines())] if "jsonl" in name else json.loads(text)


def read_table(name):
    """The cells of Markdown tables that a command printed, row by row."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    return [[x.strip() for x in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def seeds(report, name):
    """The runs of a report with this name, or with this name and a seed."""
    return [report[key] for key in report if re.fullmatch(rf"{re.escape(name)}(\.\d)?", key)]


def loss(report, name, kind="val_loss"):
    """The mean loss of a model's seeds at each of its budgets, a list."""
    runs = seeds(report, name)
    return [fmean(run[kind][m] for run in runs) for m in runs[0][kind]]


def perplexity(report, name, kind="val_loss"):
    return [exp(mean) for mean in loss(report, name, kind)]


def distance(report, name, kind="val_loss"):
    """Of the losses of a model's seeds, at the budget where it is largest."""
    losses = zip(*(run[kind].values() for run in seeds(report, name)))
    return max(max(both) - min(both) for both in losses)


def loss_and_spread(report, name):
    """The mean losses, and half the distance of the seeds, if there is more than one: a list."""
    several = len(seeds(report, name)) > 1
    return loss(report, name) + ([distance(report, name) / 2] if several else [])


def above(a, b):
    """By how many percent the numbers of a are higher than those of b."""
    return [100 * (x / y - 1) for x, y in zip(a, b, strict=True)]


def below(a, b):
    """By how many percent they are lower."""
    return [-percent for percent in above(a, b)]


def read_report(folder):
    """A folder's report.json. Every run has a log there, which ends with what the report says."""
    report = read(f"{folder}/report.json")
    for name, run in report.items():
        assert read(f"{folder}/{name}.jsonl")[-1]["final"] == run, name
    return report


# What is in more than one section

SMALL = read_report("30m")  # 30M parameters
EARLIER = read("report_150m.json")
LARGE = read_report("paper")  # the paper's sizes


def best(name):
    """Perplexities of a model of 30M parameters, at the learning rate with the lower mean loss."""
    rates = [rate for rate in (name, f"{name}-003") if seeds(SMALL, rate)]
    return perplexity(SMALL, min(rates, key=lambda rate: fmean(loss(SMALL, rate))))


MLA = best("mla12") + best("mla8") + best("mla4")
DEFAULT = best("mat321")


def most_apart(*reports, kind="val_loss"):
    """How far the losses of two seeds of a model are apart, where it is most."""
    return max(
        distance(report, name.removesuffix(".0"), kind)
        for report in reports
        for name in report
        if name.endswith(".0")
    )


PAPER = {12: (22.75, 22.35), 8: (22.86, 22.64), 4: (24.11, 22.75)}  # its MatMLA, and its MLA
PAPER_BEHIND = above(*zip(*PAPER.values()))
SIZES = {
    preset: {row["attention"] + row["layout"]: row for row in read(f"sizes_{preset}.json")["sizes"]}
    for preset in ("tiny", "paper", "published")
}
DEEPSEEK_V3 = read("bench_deepseek_v3.json")["decoding"]


# README.md

section("README.md", "MatMLA")
GB = 131072 / 1e9  # of a text, for each byte per token
claim("# GB for a text of 131,072 tokens", 2 * 128 * 128 * 61 * 2 * GB)
claim("its own key and value: # GB", SIZES["published"]["DeepSeek-V3"]["bytes measured"] * GB)

section("README.md", "What a token leaves behind")
claim("2 × 12 heads × 20 = #", SIZES["tiny"]["mha"]["numbers in a layer"])
claim("2 × 2 groups × 20 = #", SIZES["tiny"]["gqa"]["numbers in a layer"])
claim("64 + 16 = #", SIZES["tiny"]["mla"]["numbers in a layer"])
claim("whatever the number of heads** | **#**", SIZES["tiny"]["matmla"]["numbers in a layer"])
claim("DeepSeek-V3 leaves # bytes", SIZES["published"]["DeepSeek-V3"]["bytes measured"])

section("README.md", "The paper, and what we do otherwise")
ours = perplexity(LARGE, "mat"), perplexity(LARGE, "layers")
mla = [perplexity(LARGE, f"mla{m}")[0] for m in PAPER]
columns = ours[0], mla, above(ours[0], mla), ours[1]
for (m, paper), behind, *numbers in zip(PAPER.items(), PAPER_BEHIND, *columns, strict=True):
    row(str(m), *paper, behind, *numbers)
claim("Ours, after # tokens of other text", LARGE["mat.0"]["tokens"])
claim("It is #, # and #% of perplexity better", *below(*ours))
claim("with 30M parameters #, # and #%, where", *below(DEFAULT, best("layers")))

section("README.md", "What comes out")
claim("# tokens of Wikipedia", SMALL["mat321.0"]["tokens"])
claim("2 bytes = # bytes of cache per token", SMALL["mat321.0"]["cache_bytes"])
row("three MLA models", *MLA)
row("**one MatMLA, our default**", *DEFAULT)
row("one MatMLA, shares 10:1:1", *best("mat10"))
row("one nested GQA", *best("nested_gqa"))
for ahead in below(DEFAULT, best("nested_gqa")):
    claim("MatMLA is #% better than nested GQA", ahead)
claim("as good as a plain GQA with 12 (#)", *best("gqa"))
claim("costs less to train and beats all three budgets (#)", *best("mla8"))
assert SMALL["mla8.0"]["flops"] < SMALL["mat321.0"]["flops"] and MLA[1] < min(DEFAULT)
claim("is as good as MatMLA's 12 (#)", *best("mla4_long"))
claim("32 of its 128 heads take # of the time", DEEPSEEK_V3[2]["relative time"])


# RESULTS.md

section("RESULTS.md", "How to read the numbers")
TINY = read("report_tiny.json")
apart = most_apart(SMALL, EARLIER)
claim(
    "two seeds differ by up to # in loss after # tokens, or #% of perplexity",
    apart,
    SMALL["mat321.0"]["tokens"],
    100 * (exp(apart) - 1),
)
claim("For the default model it is #", most_apart(TINY))

section("RESULTS.md", "Results")
claim("-sizes): # parameters, MatMLA beside", LARGE["mat.0"]["parameters"])

section("RESULTS.md", "At the paper's sizes")
claim("for 500 steps: # tokens", LARGE["mat.0"]["tokens"])


def of_large(name, *theirs):
    """A row of the table for one model: what it cost, what came out, and the paper's."""
    run = LARGE[f"{name}.0"]
    cost = run["parameters"], run["flops"], run["tokens_per_second"], 100 * run["mfu"]
    came_out = *loss_and_spread(LARGE, name), *perplexity(LARGE, name)
    return *cost, run["memory"] / 2**30, *came_out, *theirs


for m in PAPER:
    row(f"MLA | {m}", *of_large(f"mla{m}", PAPER[m][1]))
row("**MatMLA**, the default 3:2:1 | 12 / 8 / 4", *of_large("mat"))
row(
    "MatMLA, the paper's `layers` 3:2:1 | 12 / 8 / 4",
    *of_large("layers", *(both[0] for both in PAPER.values())),
)
claim("beats the paper's** by #, # and #% of perplexity", *below(*ours))


def apart_after(step, worse, better):
    """How much higher the mean loss of one model was than another's, at 12 heads, at a step."""
    report = {}  # of the runs as they were then
    for run in LARGE:
        log = read(f"paper/{run}.jsonl")
        report[run] = next(x for x in log if "val_loss" in x and x["step"] == step)
    return loss(report, worse)[0] - loss(report, better)[0]


claim(
    "at 12 heads from # nats after 200 steps to # at the end",
    apart_after(200, "layers", "mat"),
    apart_after(500, "layers", "mat"),
)
claim(
    "at 12 heads from # nats after 300 steps to #",
    apart_after(300, "mat", "mla12"),
    apart_after(500, "mat", "mla12"),
)
claim("one MatMLA is #% behind at 12 heads, #% at 8 and #% at 4", *above(ours[0], mla))
claim("and all else ours, it is #, # and #% behind", *above(ours[1], mla))
claim("An MLA with 12 is, by #%", *below(mla[:1], mla[1:2]))
cost = [[LARGE[f"{name}.0"]["flops"]] for name in ("mla8", "mat")]
claim("takes #% fewer operations than one MatMLA", *below(*cost))
assert mla[1] < min(ours[0])
for words, name in (
    ("seeds of MLA differ", "mla12"),
    ("those of MatMLA", "mat"),
    ("those of the paper's draws", "layers"),
):
    first, second = (run["val_loss"]["12"] for run in seeds(LARGE, name))
    claim(f"{words} by #", abs(first - second))
claim("the paper reports #, # and #%.", *PAPER_BEHIND)

BEFORE = read("paper_scale/report.json")
for name, run in BEFORE.items():
    log = read(f"paper_scale/{name}/metrics.jsonl")
    assert log[-1]["final"].items() <= run.items(), name
mla = [loss(BEFORE, f"mla{m}")[0] for m in (12, 8, 4)]
claim("An earlier run, # parameters", BEFORE["matmla"]["parameters"])
claim("`paper_scale/`), # tokens of the same text", BEFORE["matmla"]["tokens"])
assert BEFORE["matmla"]["flops"] == BEFORE["mla8"]["flops"]
behind = above(perplexity(BEFORE, "matmla"), map(exp, mla))
on_wikitext = above(
    perplexity(BEFORE, "matmla", "text_loss"),
    [perplexity(BEFORE, f"mla{m}", "text_loss")[0] for m in (12, 8, 4)],
)
claim(
    "MLA with 12, 8 and 4 heads ends at #, # and #, MatMLA, for the operations of MLA with 8, at "
    "# / # / #: #% and #% of perplexity behind, and #% ahead",
    *mla,
    *loss(BEFORE, "matmla"),
    *behind[:2],
    -behind[2],
)
claim(
    "may share articles, #% behind, #% and #% ahead",
    *on_wikitext[:1],
    *(-percent for percent in on_wikitext[1:]),
)

LESS_TEXT = read("paper_scale_78m.json")
OVERFITTING = read("overfitting_control.json")
deviations = [
    stdev(run["val_loss"][str(m)] for run in seeds(OVERFITTING, f"mla{m}")) for m in (12, 8, 4)
]
on_batches = {
    name: fmean(run["last_batches"] for run in seeds(OVERFITTING, name))
    for name in ("mla12", "mla8", "mla4", "matmla")
}
assert min(on_batches, key=on_batches.get) == "mla12"
ahead = below(perplexity(LESS_TEXT, "matmla"), perplexity(LESS_TEXT, "mla") * 3)
claim("drew # tokens from only 78M", LESS_TEXT["matmla"]["tokens"])
claim("MatMLA ended # to #% of perplexity *ahead*", min(ahead), max(ahead))
claim(
    "MLA with 12, 8 and 4 heads ends at #, # and # on held-out text (standard deviations # to #)",
    *(loss(OVERFITTING, f"mla{m}")[0] for m in (12, 8, 4)),
    min(deviations),
    max(deviations),
)
claim(
    "MatMLA at # to #. On its batches",
    min(loss(OVERFITTING, "matmla")),
    max(loss(OVERFITTING, "matmla")),
)

section("RESULTS.md", "30M parameters")
claim("One cache, # bytes per token", SMALL["mat321.0"]["cache_bytes"])
claim("Only nested MHA keeps more, # bytes", SMALL["nested_mha.0"]["cache_bytes"])
claim("They draw # tokens", SMALL["mat321.0"]["tokens"])


def losses_and_perplexity(name):
    """What the table has of a model: at both rates losses and half their distance, and the end."""
    numbers = [seeds(SMALL, name)[0]["flops"]]
    for rate in name, f"{name}-003":
        if seeds(SMALL, rate):
            numbers += loss_and_spread(SMALL, rate)
    return numbers + best(name)


row("MLA | 12", *losses_and_perplexity("mla12"))
row("MLA | 8", *losses_and_perplexity("mla8"))
row("MLA | 4", *losses_and_perplexity("mla4"))
row("**MatMLA**, the default 3:2:1 | 12 / 8 / 4", *losses_and_perplexity("mat321"))
row("MatMLA 1:1:1 | 12 / 8 / 4", *losses_and_perplexity("mat111"))
row("MatMLA 10:1:1 | 12 / 8 / 4", *losses_and_perplexity("mat10"))
row("MatMLA, the paper's `layers` 3:2:1 | 12 / 8 / 4", *losses_and_perplexity("layers"))
row("GQA, 2 groups | 12", *losses_and_perplexity("gqa"))
row("GQA, 2 groups, `--d-ff 1304` | 12", *losses_and_perplexity("gqa_wide"))
row("nested GQA, 2 groups, 3:2:1 | 12 / 8 / 4", *losses_and_perplexity("nested_gqa"))
row(
    "nested MHA, 3:2:1, six times the cache | 12 / 8 / 4",
    *losses_and_perplexity("nested_mha"),
)
row("MLA, `--steps 1712` | 4", *losses_and_perplexity("mla4_long"))

claim(
    "beats nested GQA** by #, # and #% of perplexity at 12, 8 and 4 heads",
    *below(DEFAULT, best("nested_gqa")),
)
claim("beats nested MHA by #, # and #%", *below(DEFAULT, best("nested_mha")))
claim("Its 12 heads beat those of a plain GQA by #%", *below(DEFAULT[:1], best("gqa")))
size = {name: SMALL[f"{name}.0"]["parameters"] for name in ("mat321", "gqa", "gqa_wide")}
claim("GQA has #% fewer parameters", *below([size["gqa"]], [size["mat321"]]))
claim("and has #% more parameters", *above([size["gqa_wide"]], [size["mat321"]]))
cost = [SMALL[f"{name}.0"]["flops"] for name in ("gqa_wide", "mat321")]
claim("it computes #% more, as much", *above(cost[:1], cost[1:]))
claim("it is still #% behind", *above(best("gqa_wide"), DEFAULT[:1]))
claim("MatMLA is #% behind at 12 heads, #% at 8 and #% at 4", *above(DEFAULT, MLA))
behind = above(best("mat10"), MLA)
claim("10:1:1 is #% behind MLA at 12 heads and #% at 4", behind[0], behind[2])
behind = above(best("mat111"), MLA)
claim("1:1:1 is #% behind at 12 and #% ahead at 4", behind[0], -behind[2])
ahead = below(DEFAULT, best("layers"))
claim("(nothing at `--lr 0.003`), and #% at 4", ahead[2])
for percent in ahead[:2]:
    claim("ours is #% ahead at 12 and 8 heads", percent)
assert SMALL["mla8.0"]["flops"] == SMALL["mat111.0"]["flops"]
claim("and is #, # and #% better than it", *below(best("mla8") * 3, best("mat111")))
claim(
    "as good as its 12 and 8 heads, and #% better than its 4",
    *below(best("mla4_long"), DEFAULT[2:]),
)

DIAL = read("30m/dial.json")
claim("`python dial.py out/mat321 out/mat111 …`, # held-out windows", DIAL["windows"])
rises = {name: run["rises"] for name, run in read("30m/heads.json")["heads"].items()}
claim(
    "heads 5 to 8 at most # nats, while heads 1 to 4 cost # to #",
    max(rises["mat321.0"][4:8]),
    min(rises["mat321.0"][:4]),
    max(rises["mat321.0"][:4]),
)
claim("The twelve heads of MLA cost # to # each", min(rises["mla12.0"]), max(rises["mla12.0"]))
claim("At 10:1:1 they cost # to #", min(rises["mat10.0"][8:]), max(rises["mat10.0"][8:]))

last, at_12, as_before = (
    [before - after for before, after in zip(way["before"], way["after"])]
    for way in read("30m/last_heads.json").values()
)
claim("training them alone should help; it gains # nats", last[0])
claim("at 12 heads gains # and costs 4 heads #", at_12[0], -at_12[2])
claim("going on as before gains # at 12, # at 8 and # at 4", *as_before)

MLA_510_STEPS = read("report_510_steps.json")
claim(
    "for three times the operations: # / # / #, where `mixed` has # / # / # (two seeds)",
    *loss(EARLIER, "sum"),
    *loss(EARLIER, "mat"),
)
claim("MHA, with six times the cache, has # (two seeds)", *loss(EARLIER, "mha"))
of_three = sum(run["flops"] for run in MLA_510_STEPS.values())
assert isclose(seeds(EARLIER, "mat")[0]["flops"], of_three)
claim(
    "these end at #, # and #",
    *(loss(MLA_510_STEPS, name)[0] for name in ("mla12", "mla8", "mla4")),
)

section("RESULTS.md", "What was tried to close the gap")
TRIED = read("report_600_steps.json")
claim("30M parameters, # tokens", TRIED["mat-0.006"]["tokens"])
claim(
    "MLA with 12, 8 and 4 heads has #, # and #",
    *(loss(TRIED, f"mla{m}-0.006")[0] for m in (12, 8, 4)),
)
row("none", *loss(TRIED, "mat-0.006"))
row(
    "every sequence at every budget (`sum`), three times the operations",
    *loss(TRIED, "mat-0.006-sum"),
)
row("W_O of heads 5 to 12 starts at zero", *loss(TRIED, "mat-0.006-init"))
row("another budget in every third of a sequence", *loss(TRIED, "mat-0.006-segment"))
row(
    "shares 1:1:1, from 40% of the steps on 4:1:1, from 70% on 10:1:1",
    *loss(TRIED, "mat-0.006-grow"),
)
row("the same backwards", *loss(TRIED, "mat-0.006-shrink"))
row("a W_O for every budget", *loss(TRIED, "mat-0.006-wo"))
row("a feed-forward for every budget", *loss(TRIED, "mat-0.006-ffn"))

section("RESULTS.md", "The default size")
claim("of which # bytes are drawn", TINY["mat.0"]["tokens"])


def of_tiny(name):
    """A row of the table for one model."""
    run = TINY[f"{name}.0"]
    losses = [*loss(TINY, name), distance(TINY, name) / 2]
    return run["parameters"], run["cache_bytes"], *losses, *perplexity(TINY, name)


row("MHA | 12", *of_tiny("mha"))
row("nested MHA | 12 / 8 / 4", *of_tiny("nested_mha"))
row("GQA, 2 groups | 12", *of_tiny("gqa"))
row("nested GQA, 2 groups | 12 / 8 / 4", *of_tiny("nested_gqa"))
three_mla = [loss(TINY, f"mla{m}")[0] for m in (12, 8, 4)]
row(
    "MLA | 12; 8; 4",
    *(TINY[f"mla{m}.0"]["parameters"] for m in (12, 8, 4)),
    TINY["mla12.0"]["cache_bytes"],
    *(x for m in (12, 8, 4) for x in (*loss(TINY, f"mla{m}"), distance(TINY, f"mla{m}") / 2)),
    *map(exp, three_mla),
)
row("**MatMLA** | 12 / 8 / 4", *of_tiny("mat"))
claim(
    "MatMLA is #% better than nested GQA at 12 heads, #% at 8 and #% at 4, and #, # and #% behind",
    *below(perplexity(TINY, "mat"), perplexity(TINY, "nested_gqa")),
    *above(perplexity(TINY, "mat"), map(exp, three_mla)),
)

section("RESULTS.md", "Other budgets in one model")


def switched(table):
    """Perplexities after 12 heads, those after 4, and the largest change in percent."""
    change = max(abs(100 * (after[m] / table[m][m] - 1)) for after in table.values() for m in after)
    return *table["12"].values(), *table["4"].values(), change


*ppl, change = switched(read("switch_tiny.json")["perplexity"]["out/mat.0"])
_, change_of_nested = switched(read("switch_tiny.json")["perplexity"]["out/nested_mha.0"])[-2:]
claim("at most #% for MatMLA, #% for nested MHA", change, change_of_nested)
claim("MatMLA has # / # / # after 12 heads and # / # / # after 4", *ppl)
*ppl, change = switched(read("switch_small.json")["perplexity"]["out/mat.0"])
claim("(`switch_small.json`): at most #%", change)
claim("It has # / # / # after 12 heads and # / # / # after 4", *ppl)

section("RESULTS.md", "Bytes in the cache")


def cached(preset, *names):
    """Bytes per token, of which formula and tensors agree."""
    rows = [SIZES[preset][name] for name in names]
    assert all(row["bytes by formula"] == row["bytes measured"] for row in rows)
    return [row["bytes measured"] for row in rows]


different = "mha", "nested_mhaat most 8 heads", "nested_mhaat most 4 heads", "matmla"
for preset in "tiny", "paper":
    assert len({*cached(preset, "gqa", "nested_gqa", "mla", "matmla")}) == 1
claim(
    "MHA and nested MHA #. Nested MHA with at most 8 or 4 heads # or #. "
    "GQA, nested GQA, MLA and MatMLA #.",
    *cached("tiny", *different),
)
claim("Paper preset, in the same order: #; # or #; #.", *cached("paper", *different))
claim(
    "DeepSeek-V3 #, Qwen2.5-72B #, LLaMA-3.1-405B #",
    *cached("published", "DeepSeek-V3", "Qwen2.5-72B", "LLaMA-3.1-405B"),
)

COSTS = read("sizes_paper.json")["costs"]


def cost(attention, reader, *kinds):
    """Columns of Table 2, one after the other, each at α = 0, ½ and 1."""
    rows = [row for row in COSTS if (row["attention"], row["reader"]) == (attention, reader)]
    assert all(row["at our sizes"] == row["counted"] for row in rows)
    assert all(row["numbers in the paper"] == row["cached"] for row in rows)
    return [row[kind] for kind in kinds for row in rows]


row(
    "nested MHA | 0 / ½ / 1",
    *cost("nested_mha", "", "FLOPs in the paper", "counted, mixed", "cached", "cached, mixed"),
)
for reader in "expanded", "absorbed":
    row(
        f"MatMLA, {reader} | 0 / ½ / 1",
        *cost("matmla", reader, "FLOPs in the paper", "at our sizes", "counted, mixed"),
        *(
            cost("matmla", reader, kind)[0]
            for kind in ("numbers in the paper", "cached", "cached, mixed")
        ),
    )

section("RESULTS.md", "Speed")
DECODING = read("bench_paper.json")["speeds"]


def decoding(attention, heads=12, reader="", kind="step, µs"):
    """A value for each shape, batch × cached tokens."""
    reader = reader or {"matmla": "absorbed", "nested_mha": "full"}.get(attention, "")
    wanted = attention, heads, reader
    return [r[kind] for r in DECODING if (r["variant"], r["heads"], r["reader"]) == wanted]


def by_turns(*lists):
    """The first of each list, the second of each, and so on."""
    return [value for values in zip(*lists) for value in values]


def ratios(a, b):
    return [x / y for x, y in zip(a, b, strict=True)]


mha, gqa, matmla = decoding("mha"), decoding("gqa"), decoding("matmla")
row("MHA", *mha)
row("GQA, 4 groups", *gqa)
row("nested MHA at 4 heads, full cache", *decoding("nested_mha", 4))
row("MatMLA at 12 heads", *matmla)
row("MatMLA at 8", *decoding("matmla", 8))
row("MatMLA at 4", *decoding("matmla", 4))
row("MatMLA at 12 / MHA; / GQA", *by_turns(ratios(matmla, mha), ratios(matmla, gqa)))
row("MatMLA at 12, without absorption", *decoding("matmla", reader="naive"))
reading = {name: decoding(name, kind="attention read, µs") for name in ("mha", "matmla")}
row("attention of a layer: MHA; MatMLA", *by_turns(*reading.values()))

copy = ratios(decoding("mha", kind="GB/s"), decoding("mha", kind="of copy"))[-1]
cache_of_layer = 64 * 8192 * SIZES["paper"]["matmla"]["numbers in a layer"] * 2 / 1e9
claim(
    "MatMLA makes # times MHA's tokens per second; its attention alone is # times as fast, at #%",
    mha[-1] / matmla[-1],
    reading["mha"][-1] / reading["matmla"][-1],
    100 * cache_of_layer / (reading["matmla"][-1] / 1e6) / copy,
)


def share_read(joined):
    """Of the weights of the paper preset that a step at 12 heads reads, what one at 4 reads."""
    n_layer, d, d_h, d_c, d_cq, d_R, d_ff, vocabulary = 12, 768, 64, 224, 384, 32, 3072, 50304
    head = d_cq * (d_h + d_R) + 2 * d_c * d_h + d_h * d
    if joined:  # W_UK is in W_UQ, and W_UV in W_O
        head = d_cq * (d_c + d_R) + d_c * d
    rest = d * (d_cq + d_c + d_R) + 3 * d * d_ff + vocabulary * d / n_layer
    return (4 * head + rest) / (12 * head + rest)


claim(
    "take #, # and # of MHA's time",
    *(decoding("matmla", m, kind="prefill / MHA's")[3] for m in (12, 8, 4)),
)
claim(
    "A step at 4 heads reads #% of the paper preset's weights, or #% of them as `decode.py` joins",
    100 * share_read(False),
    100 * share_read(True),
)
claim("at most 1 / # = # times as fast", share_read(True), 1 / share_read(True))
claim("Twelve absorbed heads make # operations", 12 * (4 * 224 + 2 * 32) / (2 * 256))
claim("DeepSeek-V3's 128 make #", DEEPSEEK_V3[0]["FLOPs per byte"])
for step in DEEPSEEK_V3:
    row(str(step["heads"]), step["ms"], step["attention, ms"], step["FLOPs per byte"])

TRAINING = read("training_speed.json")


def before_and_now(name):
    """Tokens per second, MFU in percent and GiB of both, and how many times as fast it is now."""
    first, *_, now = TRAINING[name]["rows"]
    both = [(run["tokens/s"], 100 * run["MFU"], run["GiB"]) for run in (first, now)]
    return *both[0], *both[1], now["tokens/s"] / first["tokens/s"]


row("small, micro-batch 24", *before_and_now("small24"))
row("small, micro-batch 48, the preset's", *before_and_now("small48"))
row("small, micro-batch 96", *before_and_now("small96"))
row(
    "20 layers of the paper's width, 1,024 tokens, micro-batch 48 of 480",
    *before_and_now("paper48"),
)
beside = {  # by micro-batch and passes: tokens per second of nanoGPT and of MatMLA, and the ratio
    (int(first), int(passes)): [float(cell.replace(",", "")) for cell in numbers]
    for first, passes, *numbers in read_table("beside_nanogpt.log")
    if first.isdecimal()
}
claim("trains at #, # and # of the tokens per second of", *(beside[n, 40][2] for n in (12, 48, 96)))
claim("3adf61e1), at 96 # and #", *beside[96, 40][1::-1])
claim("If a step is one pass it is #, # and #", *(beside[n, 1][2] for n in (12, 48, 96)))


def ms_beside_passes(micro_batch):
    """Of a step of both, from tokens per second with 1 pass of so many x 1,024 tokens and 40."""
    for first, second in zip(beside[micro_batch, 1][:2], beside[micro_batch, 40]):
        yield micro_batch * 1024 * (1 / first - 1 / second) / (1 - 1 / 40) * 1e3


of_theirs, of_ours = zip(*map(ms_beside_passes, (12, 48, 96)))
claim(
    "a step costs # to # ms beside its passes here, # to # there",
    min(of_ours),
    max(of_ours),
    min(of_theirs),
    max(of_theirs),
)
one, two = (run["tokens_per_second"] for run in read("two_gpus.json").values())
claim("# tokens per second and #, # times as many", one, two, two / one)

steps = {  # for each length of the cache, the relative times of llama.cpp and of transformers
    length: [line[4:] for line in read_table("beside_llama_cpp.log") if line[0] == length]
    for length in ("256", "2,048")
}
short, long = (sorted(float(theirs) for theirs, _ in steps[length]) for length in steps)
claim("after 256 tokens takes # to # of ours there, after 2,048 tokens # to #", *short, *long)
short, long = (sorted(float(theirs) for _, theirs in steps[length]) for length in steps)
claim("transformers takes # to # and # of ours", *short, fmean(long))

PROMPTS = read("prompts.json")["rows"]
one_prompt, many = PROMPTS[::2], PROMPTS[1::2]
claim(
    "takes # ms with MHA, # with MatMLA at 12 heads and # at 4",
    *(row["eager_ms"] for row in one_prompt),
)
claim("fewer launches and kernels, #, # and #", *(row["compiled_ms"] for row in one_prompt))
claim(
    "prompts of 4,096 take #, # and # ms, compiled #, # and #",
    *(row["eager_ms"] for row in many),
    *(row["compiled_ms"] for row in many),
)
first = [row["first_s"] for row in PROMPTS]
claim("The first compiled one takes # to # s", min(first), max(first))

section("RESULTS.md", "TransMLA")
printed = read_table("transmla_smollm2.log")
off = {cells[0]: [*map(float, cells[1:])] for cells in printed if "our" in cells[0]}
caches = {
    (cells[1], cells[2]): (int(cells[4].replace(",", "")), float(cells[5]))
    for cells in printed
    if "pretrained" in cells[0]
}
claim("from transformers is # for our GQA", off["our GQA"][0])
for each in off["our MLA, naive"], off["our MLA, absorbed"]:
    claim("and # for our MLA, in float32", each[0])
    claim("In float64 our MLA differs from our GQA by at most #", each[1])
for each in caches["", ""], caches["192", "192"]:
    claim("Perplexity is # before and after", each[1])
    claim("and the cache takes # bytes per token", each[0])
in_order = "192 192", "256 128", "192 128", "256 64", "192 64", "128 128", "128 64", "64 64"
columns = [caches[tuple(widths.split())] for widths in in_order]
row("d_c, d_R", *(int(width) for widths in in_order for width in widths.split()))
row("cache, bytes per token", *(size for size, _ in columns))
row("perplexity", *(mean for _, mean in columns))

CONTROL = read("control_smollm2.json")


def trained(name):
    """Of a model of the control: parameters, bytes per token, and loss and perplexity."""
    run = CONTROL[f"{name}.0"]
    before, after = loss(CONTROL, name, "val_loss_before")[0], loss(CONTROL, name)[0]
    spread = [distance(CONTROL, name) / 2] if f"{name}.1" in CONTROL else []
    sizes = run["parameters"], run["cache_bytes"]
    return *sizes, before, exp(before), after, *spread, exp(after)


claim("on the same batches: # tokens drawn", CONTROL["mla.0"]["tokens"])
row("GQA, `--init out/exact/gqa/checkpoint.pt` | all", *trained("gqa"))
row("exact MLA | all", *trained("mla"))
row("exact MLA, `--only W_DKV,W_KR,W_UK,W_UV` | keys and values", *trained("mla_kv"))
row("an ordinary MLA, `--deepseek` (one seed) | all", *trained("deepseek"))
gqa = perplexity(CONTROL, "gqa")
claim("the MLA ends #% of perplexity *behind* the GQA", *above(perplexity(CONTROL, "mla"), gqa))
claim(
    "with #% more weights and # times the operations",
    *above([CONTROL["mla.0"]["parameters"]], [CONTROL["gqa.0"]["parameters"]]),
    CONTROL["mla.0"]["flops"] / CONTROL["gqa.0"]["flops"],
)
before = [perplexity(CONTROL, name, "val_loss_before")[0] for name in ("deepseek", "gqa")]
claim("loses #% at conversion", 100 * (before[0] / before[1] - 1))
claim("and is #% behind the GQA after training", *above(perplexity(CONTROL, "deepseek"), gqa))

TINY_CONTROL = read("control_tiny.json")


def both_seeds(name):
    return [TINY_CONTROL[f"{name}.{seed}"]["val_loss"]["12"] for seed in (0, 1)]


claim(
    "ends at # and # with seeds 0 and 1 and `--lr 0.002 --lr-adamw 0.0012`, as MLA at # and #; at "
    "0.005 and 0.003 at # and #, as MLA at # and #",
    *both_seeds("gqa-0.002"),
    *both_seeds("mla-0.002"),
    *both_seeds("gqa-0.005"),
    *both_seeds("mla-0.005"),
)

wide = {}  # for each shape, GB/s of `attend` and how many times as fast the others are
for line in (HERE / "wide_rows.log").read_text("utf-8").splitlines():
    if "attend" in line:
        shape = line.split(":")[0]
        wide[shape] = [float(line.split()[-2])]
    else:
        wide[shape].append(float(re.search(r"x([\d.]+)", line)[1]))
wide = [wide[f"h 9 w 384/192 {shape}"] for shape in ("64x8192", "16x4096", "1x16384")]
claim(
    "at # GB/s with 64 × 8,192 tokens, # with 16 × 4,096 and # with 1 × 16,384",
    *(first for first, *_ in wide),
)
claim("settings of flash decoding is #, # and # times as fast", *(max(x) for _, *x in wide))

HEALED = read("heal_smollm2.json")
before, after = (
    [value for name in ("exact", "small", "matmla") for value in perplexity(HEALED, name, kind)]
    for kind in ("val_loss_before", "val_loss")
)
claim("on other articles (# tokens", HEALED["exact"]["tokens"])
claim("the exact MLA went from perplexity # to #", before[0], after[0])
claim(
    "for # bytes, from # to #, #% more",
    HEALED["small"]["cache_bytes"],
    before[1],
    after[1],
    100 * (after[1] / after[0] - 1),
)
claim(
    "and the MatMLA from # / # / # at 9 / 6 / 3 heads to # / # / #: #%, #% and #% more",
    *before[2:],
    *after[2:],
    *above(after[2:], after[:1] * 3),
)

# TEACHING.md

section("TEACHING.md", "3. The objective (exercises 11, 14, 16) · 8 hours · 30 points")
MASKS = read("masks.json")
claim(
    "the held-out loss is # nats per byte, where the right mask gives #",
    MASKS["sees the next token"]["val_loss"]["12"],
    MASKS["right"]["val_loss"]["12"],
)
claim("The loss is # again", MASKS["does not see itself"]["val_loss"]["12"])

section("TEACHING.md", "Short answers to the questions of README and exercises")
claim("with the paper preset it is #% of those at 12 heads", 100 * share_read(False))
claim("(#% as `decode.py` joins them)", 100 * share_read(True))

print("\n".join(wrong) or f"{len(compared)} numbers are what was measured")
sys.exit(bool(wrong))
