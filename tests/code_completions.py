# ruff: noqa: E501
"""Completions for HumanEval/53, `add(x, y)`, as models write them: by name, those whose function is right, and others.

Each stands for a way in which code and what surrounds it are mixed: where a fence is, what comes before and after the
function, how it is indented, and which of several versions the answer is.
"""

FENCE = "```"
RIGHT = "def add(x, y):\n    return x + y\n"
WRONG = "def add(x, y):\n    return x - y\n"


def fenced(code: str) -> str:
    return f"{FENCE}python\n{code}{FENCE}"


PASSING = {
    "docfence": fenced(
        'def add(x, y):\n    """Adds.\n\n    ```\n    >>> add(1, 2)\n    3\n    ```\n    """\n    return x + y\n'
    ),
    "docfence unfenced": 'def add(x, y):\n    """Adds.\n\n    ```python\n    add(1, 2)\n    ```\n    """\n    return x + y\n',
    "docfence body": '    """Adds.\n\n    ```\n    add(1)\n    ```\n    """\n    return x + y\n',
    "docfence col0": fenced('def add(x, y):\n    """\nAdds\n```\nx\n```\n"""\n    return x + y\n'),
    "string with fence": fenced('MARK = "```"\ndef add(x, y):\n    s = "```"\n    return x + y + len(s) - len(MARK)\n'),
    "main()": fenced(RIGHT + "\ndef main():\n    a = int(input())\n    print(add(a, 1))\n\nmain()\n"),
    "main guard": fenced(RIGHT + "\nif __name__ == '__main__':\n    main()\n"),
    "sys.exit": fenced("import sys\n" + RIGHT + "\nsys.exit(0)\n"),
    "os._exit": fenced("import os\ndef add(x, y):\n    return x + y + len(os.sep) - 1\n\nos._exit(0)\n"),
    "while input": fenced(
        RIGHT + "\nwhile True:\n    x = input()\n    if x == 'q': break\n    print(add(1, int(x)))\n"
    ),
    "try driver": fenced(RIGHT + "\ntry:\n    print(add('a', 1))\nexcept KeyError:\n    pass\n"),
    "with driver": fenced(RIGHT + "\nwith open('input.txt') as fh:\n    data = fh.read()\n"),
    "class test+run": fenced(
        "import unittest\n"
        + RIGHT
        + "class TestAdd(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(add(1, 1), 3)\n\nif __name__ == '__main__':\n    unittest.main()\n"
    ),
    "pytest": fenced(
        "import pytest\n"
        + RIGHT
        + "\n@pytest.mark.parametrize('a', [1])\ndef test_add(a):\n    assert add(a, 1) == 2\n"
    ),
    "asserting helper": fenced(RIGHT + "\ndef test():\n    assert add(1, 1) == 3\n\ntest()\n"),
    "check(add)": fenced(RIGHT + "\ndef check(g):\n    assert g(1, 1) == 3\n\ncheck(add)\n"),
    "constant": "ZERO = 0\nONE, TWO = 1, 2\n\ndef add(x, y):\n    return x + y + ZERO * ONE\n",
    "annotated constant": "ZERO: int = 0\n\ndef add(x, y):\n    return x + y + ZERO\n",
    "table filled": "TABLE = {}\nfor i in range(3):\n    TABLE[i] = 0\n\ndef add(x, y):\n    return x + y + TABLE[1]\n",
    "table by function": fenced(
        "T = []\ndef build():\n    for i in range(3): T.append(0)\nbuild()\ndef add(x, y):\n    return x + y + T[2]\n"
    ),
    "table after": fenced("def add(x, y):\n    return x + y + T[0]\nT = []\nT.append(0)\n"),
    "attr": fenced("def add(x, y):\n    return x + y + add.zero\nadd.zero = 0\n"),
    "cached": fenced("from functools import lru_cache\ndef add(x, y):\n    return x + y\nadd = lru_cache(None)(add)\n"),
    "decorator own": fenced(
        "def deco(g):\n    def inner(*a): return g(*a)\n    return inner\n\n@deco\ndef add(x, y):\n    return x + y\n"
    ),
    "recursion limit": fenced(
        "import sys\nsys.setrecursionlimit(5000)\ndef s(n): return 0 if n == 0 else s(n - 1)\ndef add(x, y):\n    return x + y + s(3000)\n"
    ),
    "alias chain": fenced("def plus(a, b):\n    return a + b\nsum_ = plus\nadd = sum_\n"),
    "partial": fenced("from functools import partial\nimport operator\nadd = partial(operator.add)\n"),
    "global counter": fenced("count = 0\ndef add(x, y):\n    global count\n    count += 1\n    return x + y\n"),
    "global set by a function": fenced(
        "def start():\n    global ZERO\n    ZERO = 0\n\nstart()\n\ndef add(x, y):\n    return x + y + ZERO\n"
    ),
    "stub ellipsis": "Signature:\n"
    + fenced("def add(x: int, y: int) -> int:\n    ...\n")
    + "\nSolution:\n"
    + fenced(RIGHT),
    "stub raise": fenced("def add(x, y):\n    raise NotImplementedError\n") + "\n" + fenced(RIGHT),
    "stub todo after doc": fenced('def add(x, y):\n    """Adds."""\n    # your code here\n    pass\n')
    + "\n\n"
    + fenced(RIGHT),
    "stub raise after": fenced(RIGHT) + "\nThe stub:\n" + fenced("def add(x, y):\n    raise NotImplementedError\n"),
    "stub in the same block": fenced("def add(x, y):\n    pass\n\n" + RIGHT),
    "stub after": fenced(RIGHT) + "\nIts signature:\n" + fenced("def add(x, y):\n    ...\n"),
    "draft": fenced(WRONG) + "\nThis is wrong. Let me fix it:\n" + fenced(RIGHT),
    "draft unfenced": WRONG + "\nOops, that subtracts.\n\n" + RIGHT,
    "draft three": fenced(WRONG)
    + "\nHmm, no.\n"
    + fenced("def add(x, y):\n    return x * y\n")
    + "\nFinal version:\n"
    + fenced(RIGHT),
    "mistake after": fenced(RIGHT) + "\nA common mistake is to write:\n" + fenced(WRONG),
    "alternative after broken": fenced(RIGHT)
    + "\nAlternatively:\n"
    + fenced("def add(x, y):\n    return reduce(plus, [x, y])\n"),
    "think unclosed": "<think>\n" + fenced(WRONG) + "\n</think>\n\nSo:\n" + RIGHT,
    "helper later": fenced("def add(x, y):\n    return plus(x, y)\n")
    + "\nHelper:\n"
    + fenced("def plus(a, b):\n    return a + b\n"),
    "helper wrong then fixed": fenced("def plus(a, b):\n    return a - b\n\ndef add(x, y):\n    return plus(x, y)\n")
    + "\nThe helper must add. Corrected:\n"
    + fenced("def plus(a, b):\n    return a + b\n"),
    "import later block": fenced("import math\n")
    + "\nand\n"
    + fenced("def add(x, y):\n    return int(math.fsum([x, y]))\n"),
    "install block": FENCE + "bash\npip install numpy\npython add.py\n" + FENCE + "\n" + fenced(RIGHT),
    "2 spaces whole": fenced("def add(x, y):\n  z = x\n  return z + y\n"),
    "tabs whole": fenced("def add(x, y):\n\tz = x\n\treturn z + y\n"),
    "2 spaces body": "  z = x\n  if z:\n    z = z\n  return z + y\n",
    "tab body": "\tz = x\n\tif z:\n\t\tz = z\n\treturn z + y\n",
    "tab body fenced": FENCE + "\n\tz = x\n\treturn z + y\n" + FENCE,
    "body lost one": "   z = x\n    if z:\n        z = z\n    return z + y\n",
    "body lost one, block first": "   if x > 0:\n        z = x\n    else:\n        z = x\n    return z + y\n",
    "body lost all": "z = x\n    return z + y\n",
    "body 8": "        z = x\n        return z + y\n",
    "body and driver": "    return x + y\n\nn = int(input())\nprint(add(n, 1))\n",
    "body and helper": "    return plus(x, y)\n\ndef plus(a, b):\n    return a + b\n",
    "2-space body and helper": "  return plus(x, y)\n\ndef plus(a, b):\n  return a + b\n",
    "body with prose after fence": "```\n    return x + y\n```\nBecause.",
    "body nested def named add": "    def add(a, b):\n        return a + b\n    return add(x, y)\n",
    "nbsp everywhere": fenced("def add(x,\u00a0y):\n\u00a0\u00a0\u00a0\u00a0return\u00a0x + y\n"),
    "nbsp in string": fenced("def add(x, y):\n    s = 'a\u00a0b'\n    return x + y + len(s) - 3\n"),
    "zero width": fenced("\u200bdef add(x, y):\n    return x +\u200b y\n"),
    "bom": "\ufeff" + RIGHT,
    "ideographic": fenced("def add(x, y):\n\u3000\u3000return x + y\n"),
    "prose import": "import the numbers and add them\nfrom there on it is easy\n\n" + RIGHT,
    "prose def": "def is the keyword.\n\n" + RIGHT,
    "prose for": "for two numbers we do this:\n\n" + RIGHT + "\nfor more, see the docs.\n",
    "prose if/while": "while reading the task\nif unsure, ask\nwith care\n\n" + RIGHT,
    "prose annotation": "add: the sum of x and y\nNote: easy\n\n" + RIGHT + "\nadd: adds\nOutput: x\n",
    "prose indented": "Steps:\n    Take x.\n    Add y.\n\n" + RIGHT,
    "prose apostrophe": "Here's the code (it's short:\n" + RIGHT + "That's it",
    "prose ''' ": "Use ''' for docstrings.\n\n" + RIGHT,
    "prose backtick": "Use `add` as in ```add(1, 2)```:\n\n" + RIGHT,
    "repl": ">>> def add(x, y):\n...     return x + y\n... \n>>> add(1, 2)\n3\n",
    "ipython": "In [1]: def add(x, y):\n   ...:     return x + y\n   ...: \n\nIn [2]: add(1, 2)\nOut[2]: 3\n",
    "quote": "> ```python\n> def add(x, y):\n>     return x + y\n> ```\n",
    "list fence": "1. First:\n\n   ```python\n   def add(x, y):\n       return x + y\n   ```\n\n2. Done.",
    "bullet fence": "- " + FENCE + "python\n  def add(x, y):\n      return x + y\n  " + FENCE,
    "inline fence py": FENCE + "python def add(x, y): return x + y" + FENCE,
    "inline fence prose": "So " + FENCE + "def add(x, y): return x + y" + FENCE + " it is.",
    "fence tail": fenced(RIGHT)[:-3].rstrip() + FENCE + " that is it",
    "markdown indented": "The code:\n\n    def add(x, y):\n        return x + y\n\nDone.\n",
    "crlf": fenced(RIGHT).replace("\n", "\r\n"),
    "cr only in fence info": FENCE + "python\r\n" + RIGHT + FENCE,
    "eos": RIGHT + "<|eot_id|><|start_header_id|>user\ndef add(x, y): return 0",
    "eos2": RIGHT.rstrip() + "</s>",
    "eos same line": RIGHT.rstrip() + "<|end|>\n" + WRONG,
    "solution class": fenced(
        "class Solution(object):\n    def add(self, x: int, y: int) -> int:\n        return x + y\n"
    ),
    "solution static": fenced("class Solution:\n    @staticmethod\n    def add(x, y):\n        return x + y\n"),
    "solution no self": fenced("class Solution:\n    def add(x, y):\n        return x + y\n"),
    "solution + driver": fenced(
        "class Solution:\n    def add(self, x, y):\n        return x + y\n\ns = Solution()\nprint(s.add(int(input()), 2))\n"
    ),
    "cut driver": FENCE + "python\n" + RIGHT + "\ndef main():\n    n = int(input(",
    "cut after": RIGHT + "\nThis function adds the (two",
    "future late": "Here:\n" + fenced("import sys\nfrom __future__ import annotations\n" + RIGHT),
    "py2 print": fenced(RIGHT + "\nprint add(1, 2)\n"),
    "type alias": fenced(
        "from typing import Union\nNum = Union[int, float]\ndef add(x: Num, y: Num) -> Num:\n    return x + y\n"
    ),
    "dataclass": fenced(
        "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    x: int\n    y: int\ndef add(x, y):\n    p = Pair(x, y)\n    return p.x + p.y\n"
    ),
    "in try": fenced("try:\n    from operator import add\nexcept ImportError:\n    add = None\n"),
    "if def": fenced(
        "import sys\nif sys.version_info > (3,):\n    def add(x, y):\n        return x + y\nelse:\n    add = None\n"
    ),
    "comment col 0": fenced("def add(x, y):\n# adds\n    z = x\n# done\n    return z + y\n"),
    "paren col0": fenced("LIST = [\n0,\n]\ndef add(\n    x,\n    y,\n):\n    return (\nx + y + LIST[0]\n)\n"),
    "semicolon": fenced("ZERO = 0; ONE = 1\ndef add(x, y): z = x; return z + y + ZERO\n"),
    "unused pandas": fenced("import pandas as pd\nimport matplotlib.pyplot as plt\n" + RIGHT + "plt.show()\n"),
    "walrus match": fenced(
        "def add(x, y):\n    match x:\n        case _:\n            if (z := x) is not None:\n                return z + y\n"
    ),
    "example data": fenced(RIGHT + "\nx = 5\ny = 'a'\nresult = add(x, y)\n"),
    "html pre": "<pre><code>\n" + RIGHT + "</code></pre>",
    "random seed": fenced("import random\nrandom.seed(0)\ndef add(x, y):\n    random.random()\n    return x + y\n"),
    "decimal": fenced(
        "from decimal import Decimal, getcontext\ngetcontext().prec = 60\ndef add(x, y):\n    assert len(str(Decimal(1) / 3)) > 50\n    return x + y\n"
    ),
    "helper same as input var": fenced("def add(a, n):\n    return a + n\nn = int(input())\n"),
    "answer tag": "<answer>\n" + RIGHT + "</answer>",
    "quoted problem": 'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    >>> add(5, 7)\n    12\n    """\n    return x + y\n',
    "restated stub and body apart": fenced('def add(x: int, y: int):\n    """Add two numbers"""\n')
    + "\n\nThe body is:\n\n    return x + y\n",
    "runs on": fenced(RIGHT) + "\n\n### Instruction:\nSubtract.\n\n### Response:\n" + fenced(WRONG),
    "tests import from a file": fenced(RIGHT)
    + "\nTests:\n"
    + fenced("import unittest\nfrom your_module import add\n\nclass TestAdd(unittest.TestCase):\n    pass\n"),
    "two files in one block": fenced("# add.py\n" + RIGHT + "\n# test_add.py\nimport add\nassert add.add(1, 2) == 3\n"),
    "relative import": fenced("from .helpers import plus\ndef plus(a, b):\n    return a + b\n")
    + "\nand\n"
    + fenced("from . import plus\ndef add(x, y):\n    return plus(x, y)\n"),
    "body and tests": "    return x + y\n\nTests:\n" + fenced("from solution import add\nassert add(1, 2) == 3\n"),
    "class from a file": fenced("class Solution:\n    def add(self, x, y):\n        return x + y\n")
    + "\nUsage:\n"
    + fenced("from solution import Solution\nprint(Solution().add(1, 2))\n"),
    "numpy's names": fenced("from numpy import *\ndef add(x, y):\n    return int(sum(array([x, y])))\n"),
}
SHADOWING = "def add(x, y):\n    return int(str(sum(list((x, max(y, y))))))\n\n"
PASSING |= {
    f"shadowing driver: {driver}": fenced(SHADOWING + driver)
    for driver in (
        "str = input('a: ')\nprint(add(int(str), 1))\n",
        "list = [1, 2]\nprint(add(*list))\n",
        "list: list = sorted([2, 1])\nmax, min = 2, 1\n",
        "sum = add(1, 2)\nprint(sum)\n",
        "sum = 0\nfor x in range(3):\n    sum += add(x, 1)\n",
        "add = add(1, 2)\nprint(add)\n",
        "while True:\n    str = input()\n    if not str: break\n",
        "for list in [[1, 2], [3, 4]]:\n    print(add(*list))\n",
    )
}
PASSING |= {
    "own sum after": fenced("def add(x, y):\n    return sum(x, y)\n\nsum = lambda a, b: a + b\n"),
    "own class, then an object": fenced(
        "class Adder:\n    def plus(self, a, b):\n        return a + b\n\ndef add(x, y):\n    return Adder().plus(x, y)\n\nAdder = Adder()\nprint(Adder.plus(1, 2))\n"
    ),
    "own cache": fenced("def cache(f):\n    return lambda *a: f(*a)\n\n" + RIGHT + "\nadd = cache(add)\n"),
}
FAILING = {
    "replaced": fenced(RIGHT + "\nadd = lambda x, y: 0\n"),
    "shadowed before": fenced("sum = 5\n\ndef add(x, y):\n    return sum((x, y))\n"),
    "only imported": fenced("from your_module import add\nassert add(1, 2) == 3\n"),
    "missing package": fenced("from pandas import Series\ndef add(x, y):\n    return int(Series([x, y]).sum())\n"),
    "wrong": fenced(WRONG),
    "wrong body": "    return x - y\n",
    "syntax": fenced("def add(x, y):\n    return x +\n"),
    "no indent": fenced("def add(x, y):\nreturn x + y\n"),
    "other name": fenced("def plus(x, y):\n    return x + y\n"),
    "final wrong": fenced(RIGHT) + "\nWait, it should subtract:\n" + fenced(WRONG),
    "nothing": "I cannot do it.",
    "empty": "",
    "call only": fenced("print(add(1, 2))"),
    "nested only": fenced("def outer():\n    def add(x, y):\n        return x + y\n    return add\n"),
    "uses missing helper": fenced("def add(x, y):\n    return plus(x, y)\n"),
    "no import": fenced("def add(x, y):\n    return int(math.fsum([x, y]))\n"),
    "shadowed": fenced(RIGHT + "\nadd = None\n"),
}
