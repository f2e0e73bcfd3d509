"""The README's table of what works with what, from the steps that the tests take.

    python tests/layer_table.py

writes it into README.md; `test_readme.py` fails where the two differ.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import cases
import steps

README = pathlib.Path(__file__).parents[1] / "README.md"
COLUMNS = ("layerwise", "double_backward", "vectorized_map")
BEGIN, END = "<!-- layer table: python tests/layer_table.py -->\n", "<!-- end of layer table -->"
HEAD = (
    '| layers, losses, models | `"layerwise"` | `"double_backward"` | `"vectorized_map"` '
    '| `"auto"` takes | JAX: `"linearized"` |\n|---|---|---|---|---|---|\n'
)


def rows():
    """The names of the rows, in the order of the cases."""
    return list(dict.fromkeys(case.row for case in cases.CASES))


def cells(row):
    """What each way does with a row's models: "exact", "refused" or both; and what "auto" takes.

    Last what the one way on JAX does.
    """
    results = {column: set() for column in (*COLUMNS, "linearized")}
    for case in cases.CASES:
        if case.row == row:
            for column in COLUMNS:
                results[column].add(cell(case, column))
            results["linearized"].add(on_jax()[case.name])
    *found, last = [" or ".join(sorted(result)) for result in results.values()]
    return (*found, "layerwise" if found[0] == "exact" else "double_backward", last)


@functools.cache
def on_jax():
    """ "exact" or "refused" of each case on JAX, which needs a process of its own."""
    program = pathlib.Path(__file__).parent / "on_jax" / "steps_on_jax.py"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    printed = subprocess.check_output([sys.executable, str(program)], env=environment, text=True)
    return json.loads(printed)


def cell(case, way):
    """ "exact" or "refused"; the tests hold the step to it."""
    return "refused" if steps.step(case.name, way, "graph").refusal else "exact"


def written():
    """The table in README.md: for each row its cells."""
    text = README.read_text(encoding="utf-8")
    table = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    found = {}
    for line in table.removeprefix("\n").removeprefix(HEAD).strip().splitlines():
        names, *results = (cell.strip() for cell in line.strip("|").split("|"))
        found |= dict.fromkeys(names.split("; "), tuple(results))
    return found


def main():
    """Write the table into README.md; rows with the same cells are one line."""
    lines = {}
    for row in rows():
        lines.setdefault(cells(row), []).append(row)
    body = "".join(
        f"| {'; '.join(names)} | {' | '.join(results)} |\n" for results, names in lines.items()
    )
    text = README.read_text(encoding="utf-8")
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    table = f"{BEGIN}\n{HEAD}{body}\n{END}"
    README.write_text(re.sub(pattern, lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
