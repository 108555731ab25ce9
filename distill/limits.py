"""Bounds on what others wrote: files of rows, YAML, chat templates.

A prompt file, a recipe or a model directory may come from anywhere, and a short input can ask for unbounded memory: one
JSON line without an end, a compressed Parquet page of zeros, aliases of aliases in YAML, a template that doubles a
string forty times. Each reader checks its input against the constant here *before* it pays the price, and its message
names the value and the bound.

The values are far above what honest data needs (the longest published reasoning traces have about 1 MB of text) and far
below what a small machine cannot take. They are constants and not settings: input that exceeds one is damaged.
"""

ROW_BYTES = 32 << 20  # of a line or a CSV row (as Python objects up to 25 times as much), or of a Parquet row's text
JSON_DEPTH = 100  # brackets inside one another, in a row or in JSON kept as text in a column
ARRAY_BYTES = 1 << 30  # of a JSON array, unpacked: it is held in memory whole
BATCH_ROWS = 32  # of Parquet decoded together: a row has at most ROW_BYTES of text

YAML_BYTES = 4 << 20  # of a recipe, a card or one `--set` value
YAML_NODES = 100_000  # values in it, an alias counting for everything that it repeats
YAML_DEPTH = 50  # mappings and lists inside one another
YAML_DIGITS = 400  # of one number; float64 ends at 309

TEMPLATE_BYTES = 1 << 20  # of a chat template's source; published ones have up to 20 kB
TEMPLATE_SECONDS = 10  # of processor time to render one conversation; it takes less than a millisecond
TEMPLATE_MEMORY = 2 << 30  # of address space of the process that renders
RENDERED_CHARACTERS = 64 << 20  # of one rendered conversation
