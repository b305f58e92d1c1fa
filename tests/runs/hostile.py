"""Strings that something takes for its own language: shells, YAML, sbatch, ssh, Kubernetes, C and Python."""

from __future__ import annotations

CANARY = "touch canary"
"""Nobody may execute it."""
COMMANDS = (
    CANARY,
    f"$({CANARY})",
    f"`{CANARY}`",
    f"; {CANARY}",
    f"& {CANARY} &",
    f"| {CANARY}",
    f"|| {CANARY}",
)
BREAKS_OUT_OF = ("", '"', "'", "\\", "'\\''", "\"'", "\n", "\r\n", "#\n", ")", "}", "]]", "\\\n", "EOF\n")
"""What ends a word, a quotation, a comment, a substitution or a document within a script."""
OTHERS = (
    # shells: expansion, globs, tildes, history, assignment, redirection, descriptors
    *(
        "$HOME",
        "${HOME}",
        "${IFS}x",
        "$IFS$9",
        "$$",
        "$!",
        "$@",
        "$*",
        "$0",
        "!!",
        "!touch",
        "^a^b",
        "~",
        "~root",
    ),
    *(
        "*",
        "?",
        "[a-z]*",
        "/*",
        "{a,b}",
        "{1..9}",
        "a b",
        " a",
        "a ",
        "  ",
        "\t",
        "a\tb",
        "a=b",
        "A=b touch canary",
    ),
    *("> canary", ">> canary", "2>canary", "&>canary", "< /etc/passwd", "<(touch canary)", ">(touch canary)"),
    *(
        "<<EOF",
        "<<'EOF'\ntouch canary\nEOF",
        "<<< x",
        "x\nEOF\ntouch canary\n",
        "$'\\x74ouch canary'",
        '$"x"',
    ),
    *(
        "((1))",
        "$((1+1))",
        "${x:=touch}",
        "${x@P}",
        "\\",
        "\\\\",
        "\\n",
        "\\$(touch canary)",
        "'",
        '"',
        "''",
        '""',
        "`",
    ),
    # options
    *(
        "-",
        "--",
        "-x",
        "--help",
        "--privileged",
        "-oProxyCommand=touch canary",
        "--wrap=touch canary",
        "-v/:/host",
    ),
    # comments and directives
    *(
        "#",
        "# x",
        "a#b",
        "#SBATCH --wrap=touch",
        "x\n#SBATCH --output=canary",
        "#!/bin/sh",
        "%n",
        "%j-%x",
        "%%",
        "%s%n",
    ),
    # YAML
    *(
        "y",
        "n",
        "yes",
        "No",
        "on",
        "true",
        "null",
        "~",
        "1",
        "010",
        "0o17",
        "0x1F",
        "1_000",
        "1e3",
        "1:30",
        ".inf",
        ".5",
    ),
    *(
        "- a",
        "? a",
        "a: b",
        "{a: b",
        "[a",
        "&a b",
        "*a",
        "!!python/object:os.system x",
        "!tag",
        "|\n  x",
        ">-",
        "---",
    ),
    *("...\n---", "%YAML 1.1", "@x", "a\n  b: c", "<<", "=", "2026-01-01", "\ufeffx"),
    # templates: ours, Kubernetes', Python's, Go's
    *(
        "@COMMAND@",
        "@SETUP@",
        "$pod",
        "$name",
        "$(PET_NODE_RANK)",
        "$$(x)",
        "$(",
        "${NAME}",
        "%(x)s",
        "{x}",
        "{{ .x }}",
    ),
    # separators of the engines' own
    *(":", "a:b", "a:b:c", ",", "a,b", "/", "//", "..", "../..", "/a/../b", ".", "src=/,dst=/"),
    # what is not ASCII, or not printed
    *(
        "é",
        "ü\u0301",
        "日本語",
        "🙂",
        "\u202e",
        "\u200b",
        "\x85",
        "\u2028",
        "\u2029",
        "\x1b[31m",
        "\x07",
        "\x7f",
        "\b",
    ),
    *("\xa0", "\ufffe", "a\x00b", "\ud800"),
)


def strings() -> list[str]:
    """At least 200, each once."""
    composed = [f"{end}{command}{end}" for end in BREAKS_OUT_OF for command in COMMANDS]
    return list(
        dict.fromkeys([*composed, *OTHERS, "x" * 300, f"'\"\\$({CANARY})`{CANARY}`\n;{CANARY}\n#%*~"])
    )


SAMPLE = (
    f"""'; {CANARY}; "$({CANARY})`{CANARY}` > canary ${{HOME}} $(PET_NODE_RANK) @COMMAND@ %n 🙂 * #\\""",
    f"x\n{CANARY}\n#SBATCH --wrap={CANARY}\nEOF\n",
    f"-oProxyCommand={CANARY}",
)
"""One that quotes must hold, one of several lines, one that looks like an option."""
