"""Model directories and templates that somebody made to do harm."""

import shutil
from pathlib import Path
from random import Random
from typing import ClassVar

from edgekit.source.opening import open_checkpoint
from edgekit.tests.attack import odd_files, samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, Attack, BreachError, LeftBehindError
from edgekit.tests.attack.commands import call
from edgekit.tests.tiny.adapters import q_proj_updates, write_adapter


_CODE = "from pathlib import Path\nPath({canary!r}).touch()\n"
_PICKLE = b"cposix\nsystem\n(S'touch {canary}'\ntR."


class HostileDirectories(Attack):
    """hostile model directories"""

    share = 8.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.place / "model")
        write_adapter(self.place / "adapter", q_proj_updates())
        self._bring_code(self.place / "model")

    def open(self) -> None:
        self.names = sorted(path.name for path in (self.place / "model").iterdir())
        self.work = self.place / "work"

    def _bring_code(self, directory: Path) -> None:
        canary = str(self.place / "canary")
        for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py"):
            (directory / name).write_text(_CODE.format(canary=canary))
        (directory / "pytorch_model.bin").write_bytes(_PICKLE.replace(b"{canary}", canary.encode()))
        autos = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
        samples.edit(directory / "config.json", auto_map=autos)
        samples.edit(
            directory / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["tokenization_x.X", None]},
        )

    def case(self, random: Random) -> None:
        odd_files.remove(self.work)
        self.work.mkdir()
        model = shutil.copytree(self.place / "model", self.work / "model")
        adapter = shutil.copytree(self.place / "adapter", self.work / "adapter")
        for _ in range(random.choice((1, 1, 2, 3))):
            where = random.choice((model, model, model, adapter))
            name = random.choice([*(path.name for path in where.iterdir()), odd_files.name(random)])
            odd_files.put(where / name, random)
        before = sorted(path.name for path in self.work.iterdir())
        try:
            call(*self._command(random, model, adapter))
        finally:
            found = {*self.work.iterdir()} - {self.work / "out"}
            odd_files.remove(self.work)
        if (self.place / "canary").exists():
            raise BreachError("code of a model ran")
        if sorted(path.name for path in found) != before:
            raise LeftBehindError(f"{[path.name for path in found]}")

    def _command(self, random: Random, model: Path, adapter: Path) -> tuple[object, ...]:
        out = self.work / "out"
        with_adapter = ("--adapter", adapter) if random.random() < 0.3 else ()
        format = random.choice(("gguf", "onnx", "mlc"))
        target = "webgpu-desktop-integrated" if format == "mlc" else samples.TARGET
        chosen = ("--target", target, "--format", format, "--no-compile")  # a minute each
        plan = ("plan", model, *chosen, *with_adapter)
        return random.choice((
            plan,
            plan,
            ("export", *plan[1:], "--no-verify", "--no-calibration", "-o", out),
            ("merge", model, *with_adapter, "-o", out),
            ("inspect", model),
            ("plan", random.choice(sorted(model.iterdir())), "--target", samples.TARGET),
        ))  # fmt: skip


class HostileTemplates(Attack):
    """hostile templates"""

    expressions: ClassVar[tuple[str, ...]] = (
        "1 / 0", "1|round(300, 'ceil')", "'a' * 99999999999", "10 ** 10 ** 10", "''.__class__",
        "messages.__class__.__mro__", "messages[0].content.encode('punycode')", "x.y.z",
        "range(99999999)|list", "'a'.encode() * 3000", "[1] * 99999999", "'%9999999999d' % 1",
        "'{:>9999999999}'.format(1)", "'ab'|wordwrap(0)", "'x'|center(9999999999)", "lipsum(999)",
        "cycler('a').next()", "self._TemplateReference__context", "cls", "'\\ud800'", "'\ud7ff'",
        "raise_exception('no')", "strftime_now('%Y' * 9999)", "messages|tojson(indent=99999)",
        "messages|map(attribute='__class__')|list", "namespace(a=1).a", "(1).__bool__()",
        "messages[-1].content.replace('', 'a' * 9999)", "'(a+)+$'", "dict(a=1).items()|list",
        "'a'|attr('upper')", "joiner", "messages|groupby('role')", "1.0|int(99)", "-(-(-1))",
        "'a'.join(['b'] * 99999)", "'x'.zfill(9999999999)", "'x'.expandtabs(99999999)",
        "'\\t'.expandtabs(99999999)", "2 ** 100000", "1 << 99999999", "[[]] * 3", "none.x",
        "messages.append(1)", "messages.clear()", "'a'.translate({97: 'b' * 9999})", "loop",
    )  # fmt: skip
    wrappers: ClassVar[tuple[str, ...]] = (
        "{{{{ {0} }}}}",
        "{{% set x = {0} %}}{{{{ x }}}}",
        "{{% if {0} %}}a{{% endif %}}",
        "{{% for i in [1, 2, 3] %}}{{{{ {0} }}}}{{% endfor %}}",
        (
            "{{% for i in range(99999) %}}{{% for j in range(99999) %}}{{{{ {0} }}}}{{% endfor %}}"
            "{{% endfor %}}"
        ),
        "{{% macro m(a) %}}{{{{ m(a) }}}}{{{{ {0} }}}}{{% endmacro %}}{{{{ m(1) }}}}",
        (
            "{{% set ns = namespace(x='ab') %}}{{% for i in range(60) %}}"
            "{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}{{{{ {0} }}}}"
        ),
        "{{% filter upper %}}{{{{ {0} }}}}{{% endfilter %}}",
        "{{% call raise_exception({0}) %}}{{% endcall %}}",
        "{{% include {0} %}}",
        "{{% import {0} as x %}}",
        "{{% extends {0} %}}",
        "{{% generation %}}{{{{ {0} }}}}{{% endgeneration %}}",
        "{{% set x %}}{{{{ {0} }}}}{{% endset %}}{{% set y %}}{{{{ x }}}}{{{{ x }}}}{{% endset %}}",
    )

    share = 4.0
    limit_s = OTHER_PROGRAMS_S

    def prepare(self) -> None:
        samples.checkpoint(self.place / "model")

    def case(self, random: Random) -> None:
        pieces = [
            random.choice(self.wrappers).format(random.choice(self.expressions))
            for _ in range(random.choice((1, 1, 2, 3)))
        ]
        depth = random.choice((0, 0, 0, 5, 50, 500))
        whole = random.choice(("", samples.TEMPLATE))
        source = "{% if true %}" * depth + whole + "".join(pieces) + "{% endif %}" * depth
        path = self.place / "model" / "chat_template.jinja"
        path.write_text(source, encoding="utf-8", errors="surrogatepass")
        open_checkpoint(self.place / "model").text.rules()
