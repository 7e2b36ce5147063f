"""Make docs/diff.md: every hunk in which the two scripts differ, with its explanation.

python docs/diff.py                       # prints it
python docs/diff.py --out docs/diff.md    # writes it
"""

import argparse
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "diff.md"
COMMAND = "git diff --no-index --unified=0 global_ppo.py trajsep_ppo.py"

INTRODUCTION = """# The diff, hunk by hunk

`global_ppo.py` and `trajsep_ppo.py` are the same program. These are all the lines in which they differ, except
for their docstrings, from the baseline (`-`) to the method (`+`). `python docs/diff.py` makes this page.

```bash
git diff --no-index global_ppo.py trajsep_ppo.py
```
"""

EXPLANATIONS = (
    """**Flags.** The share of the own reward, and who shares a trajectory.""",
    """The environment says in `group` who belongs together.""",
    """**From entities to groups.** The baseline sums the entity axis away (G = 1), the method keeps it (G = E):
`x[g] = sum over the members e of g of x[e]`. Log probabilities, entropies and rewards all pass through here.""",
    """**A value for each group**, the mean of its members' values, in place of the team's; **and a reward** that is
`w * own + (1 - w) * mean of the team's groups`, where the mean is over the groups that are alive.""",
    """**In the loop** the team's sum becomes each group's share.""",
    """**The check** of the share.""",
)


def hunks():
    """Changed lines of each hunk after the docstrings, a list of lists."""
    diff = subprocess.run(COMMAND.split(), cwd=ROOT, capture_output=True, text=True).stdout
    docstring_end = (ROOT / "trajsep_ppo.py").read_text().splitlines().index('"""', 1)
    found = []
    for hunk in diff.split("\n@@ ")[1:]:
        place, *lines = hunk.splitlines()
        first_line = int(place.split("+")[1].split()[0].split(",")[0])
        if first_line > docstring_end:
            found.append(lines)
    return found


def page():
    """The text of docs/diff.md."""
    parts = [INTRODUCTION]
    for explanation, lines in zip(EXPLANATIONS, hunks(), strict=True):
        parts.append(explanation + "\n\n```diff\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the file to write it to, in place of printing it")
    args = parser.parse_args()
    text = page()
    if args.out:
        try:
            args.out.write_text(text)
        except OSError as error:
            parser.error(str(error))
        print(f"written to {args.out}")
    else:
        print(text, end="")
