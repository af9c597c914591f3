"""``python -m tests.families llama t5``: what works in these families; without names, the page from the kept rows."""

import sys

from tests.families.catalogue import FAMILIES
from tests.families.checks import examine
from tests.families.page import keep_and_write

if names := sys.argv[1:]:
    for family in FAMILIES:
        if family.name in names:
            for method, answers in examine(family).items():
                for check, answer in answers.items():
                    print(family.name, method, check, *answer.values(), sep="  ", flush=True)
else:
    keep_and_write()
