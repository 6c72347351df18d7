"""Run code like the cells of a notebook; as a program, code that arrives in lines of JSON on standard input.

This needs only the standard library of any Python, so that its source can be passed to `python -c` anywhere.
"""

import ast
import builtins
import io
import json
import os
import sys
import types
from typing import Any

_ERROR_CHARS = 1_000


def execute(code: str, names: dict[str, Any], label: str) -> None:
    """Run code, and print the value of its last statement if that is an expression and not None."""
    tree = ast.parse(code, label)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, label, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), label, "eval", dont_inherit=True), names)
        if value is not None:
            sys.stdout.write(f"{value!r}\n")


def describe(fault: BaseException, label: str) -> str:
    """Return the type and message of an exception and the line of the code that raised it."""
    try:
        message = fault.msg if isinstance(fault, SyntaxError) else str(fault)
    except BaseException:
        message = "its message cannot be shown"
    kind = type(fault).__name__
    text = f"{kind}: {message[:_ERROR_CHARS]}" if message else kind
    return text + line_suffix(fault, label)


def line_suffix(fault: BaseException, label: str) -> str:
    """Return the line of the code that raised an exception, such as " (line 3)"; empty if unknown."""
    line = fault.lineno if isinstance(fault, SyntaxError) and fault.filename == label else None
    trace = fault.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == label:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""


def main() -> None:
    """Answer each line {"code": text} with a line {"output": text, "error": text or null}."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # output that bypasses sys.stdout must not mix with answers
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    for number, line in enumerate(requests, start=1):
        label = f"<code {number}>"
        sys.stdout = sys.stderr = stream = io.StringIO()
        error = None
        try:
            execute(json.loads(line)["code"], module.__dict__, label)
        except BaseException as fault:
            if not isinstance(fault, SystemExit) or fault.code not in (None, 0):
                error = describe(fault, label)
        answers.write(json.dumps({"output": stream.getvalue(), "error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
