"""Words that mean something to HTML, Markdown, YAML, Jinja or a terminal, as files of strangers may hold them."""

HOSTILE = [
    "</details><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--", "]]>", "<svg/onload=alert(1)>",
    "![p](https://evil.example/t.png)", "[a](javascript:alert(1))", "[a]: javascript:alert(1)", "<javascript:alert(1)>",
    "<https://evil.example>", "a | b | c |", "\\| a \\|", "\\", "\\\\|", "`", "``x", "```\n", "~~~\n# x", "`<b>`</td>",
    "\n---\nlicense: mit\n---\n", "---", "...", "\n\n# Heading", "# heading", "## heading", "> quote", "- item",
    "1. item",    "+ item", "* item", "===", "\n===\n", "    code", "\tcode", "a\n\nb", "a\r\nb",
    "a\u2028# b", "a\x0b# b",
    "license: mit\nbase_model: x", "!!python/object/apply:os.system [id]", "&anchor *alias", "{{ 7 * 7 }}", "{% raw %}",
    "{{ header.__class__ }}", "${oc.env:HOME}", "**b**", "_e_", "~~s~~", "&lt;script&gt;", "&#60;script&#62;", "$$x$$",
    "<a href='javascript:x'>y</a>", "![p][q]", "[q]: https://evil.example/t.png 'x'", "<details>", "</p></td></table>",
    "\x1b[2Jgone", "\u202eevil", "\x00", "a" * 3000, "|\n| --- |\n| x |", "<b\n>", "`]`(javascript:x)[`",
]  # fmt: skip
