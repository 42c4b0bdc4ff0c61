"""What the tests ran of the server, by file, from SlipCover's JSON; exits with 1 where it is less than the floor.

    python scripts/check_coverage.py build/coverage.json

SlipCover's own floor is not used: with processes of tests beside each other its table is empty then.
"""

import json
import sys
from pathlib import Path
from typing import Final

FLOOR: Final = 92  # per cent of the lines


def main(file: Path) -> int:
    found = json.loads(file.read_text(encoding="utf-8"))
    shares = {name: each["summary"]["percent_covered"] for name, each in found["files"].items()}
    for name, share in sorted(shares.items(), key=lambda item: item[1]):
        if share < FLOOR:
            sys.stdout.write(f"{share:5.1f} %  {name}\n")
    total: float = found["summary"]["percent_covered"]
    sys.stdout.write(f"The tests run {total:.1f} % of the server's lines; at least {FLOOR} are asked for.\n")
    return int(total < FLOOR)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
