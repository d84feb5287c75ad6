"""Chat templates that want too much time, memory or stack, that reach out, or that are broken.

Each must end in a refusal or in text of a bounded size, within the limits, and never in the death
of the process that asked.
"""

from collections.abc import Mapping


_HUGE = (3_000_000_000, 10**18, -(10**12), 10**30)

# Filters and methods that take a size, a width or a count, with a place for the number.
_SIZED = {
    "round": "{{ 1|round(N, 'ceil') }}",
    "round down": "{{ 1.5|round(N, 'floor') }}",
    "round, common": "{{ 1.5|round(N) }}",
    "center": "{{ 'x'|center(N) }}",
    "indent": "{{ 'a\nb'|indent(N) }}",
    "wordwrap": "{{ 'a b'|wordwrap(N, wrapstring='x' * 1000000) }}",
    "truncate": "{{ ('x' * 1000000)|truncate(N) }}",
    "batch": "{{ [1]|batch(N, 'x')|list }}",
    "slice": "{{ [1]|slice(N)|list|length }}",
    "ljust": "{{ 'x'.ljust(N) }}",
    "rjust": "{{ 'x'.rjust(N) }}",
    "zfill": "{{ 'x'.zfill(N) }}",
    "expandtabs": "{{ '\t'.expandtabs(N) }}",
    "text times": "{{ 'x' * N }}",
    "times text": "{{ N * 'x' }}",
    "bytes times": "{{ 'a'.encode() * N }}",
    "list times": "{{ [1] * N }}",
    "tuple times": "{{ (1, 2) * N }}",
    "power": "{{ 7 ** N }}",
    "power of a float": "{{ 7.5 ** N }}",
    "range": "{{ range(N) }}",
    "range as a list": "{{ range(N)|list }}",
    "a loop over a range": "{% for i in range(N) %}{% endfor %}",
    "cycler": "{% set c = cycler(*range(N)) %}{{ c.next() }}",
    "percent": "{{ '%Nd' % 3 }}",
    "percent, precision": "{{ '%.Nf' % 3 }}",
    "percent, star": "{{ '%*d' % (N, 3) }}",
    "percent, both stars": "{{ '%*.*f' % (N, N, 3.0) }}",
    "format": "{{ '{:N}'.format(3) }}",
    "format, precision": "{{ '{:.Nf}'.format(3.0) }}",
    "format, nested": "{{ '{:{}}'.format(3, N) }}",
    "format filter": "{{ '%Nd'|format(3) }}",
    "format_map": "{{ '{a:N}'.format_map({'a': 1}) }}",
    "json": "{{ {'a': 1}|tojson(indent=N) }}",
    "int of a base": "{{ '1'|int(0, N) }}",
    "sum": "{{ range(99999)|sum(start=N) }}",
    "filesizeformat": "{{ N|filesizeformat }}",
    "xmlattr": "{{ {'a': 'x' * 1000000}|xmlattr }}{{ N }}",
    "an index": "{{ 'abc'[N:] }}{{ [1][N] }}",
    "split": "{{ ('a ' * 500000).split(' ', N)|length }}",
    "to_bytes": "{{ (5).to_bytes(N, 'big') }}",
}

_DOUBLED = "x" * 64
# What doubles or squares a value again and again.
_GROWING = {
    "block set": "{% set a = 'LONG' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 28 + "{{ a }}",
    "block set that is not written": "{% set a = 'LONG' %}"
    + "{% set a %}{{ a }}{{ a }}{% endset %}" * 28,
    "block set with a filter": "{% set a = 'LONG' %}"
    + "{% set a | upper %}{{ a }}{{ a }}{% endset %}" * 28,
    "filter block": "{% set a = 'LONG' %}"
    + "{% set a %}{% filter replace('x', 'xxxx') %}{{ a }}{% endfilter %}{% endset %}" * 20,
    "call block": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 26
    + "LONG"
    + "{% endcall %}" * 26,
    "macros": "".join(
        f"{{% macro m{i}() %}}{{{{ m{i - 1}() }}}}{{{{ m{i - 1}() }}}}{{% endmacro %}}"
        for i in range(1, 30)
    ).join(["{% macro m0() %}LONG{% endmacro %}", "{% set x = m29() %}"]),
    "concatenation": "{% set n = namespace(x='LONG') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "addition": "{% set n = namespace(x='LONG') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested lists, as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "nested objects": "{% set n = namespace(x={}) %}{% for i in range(60) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|string|length }}",
    "a join": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
    "join filter": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x]|join(n.x) %}{% endfor %}",
    "replace": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "replace filter": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
    "replace of nothing": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('', n.x) %}{% endfor %}",
    "escape": "{% set n = namespace(x='&') %}{% for i in range(30) %}"
    "{% set n.x = n.x|forceescape|forceescape|forceescape %}{% endfor %}",
    "urlencode": "{% set n = namespace(x='%') %}{% for i in range(60) %}"
    "{% set n.x = n.x|urlencode %}{% endfor %}",
    "JSON of JSON": "{% set n = namespace(x='\"') %}{% for i in range(60) %}"
    "{% set n.x = n.x|tojson|tojson %}{% endfor %}",
    "repr of repr": "{% set n = namespace(x='\\\\') %}{% for i in range(60) %}"
    "{% set n.x = [n.x]|string %}{% endfor %}",
    "numbers": "{% set n = namespace(x=3) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "a power of a power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "shifted by division": "{% set n = namespace(x=10 ** 300) %}{% for i in range(99) %}"
    "{% set n.x = n.x * 10 ** 300 %}{% endfor %}",
    "loops in loops": "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}"
    "x{% endfor %}{% endfor %}{% endfor %}",
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "an unused product": "{% set s = 'x' * 999999 %}"
    "{% set s = s.replace('x', 'xxxxxxxxxxxxxxxx') %}",
    "unique": "{{ (range(99999)|map('string')|list * 9)|unique|list|length }}",
    "groupby": "{% for i in range(9999) %}{% set x = range(99999)|groupby('real') %}{% endfor %}",
    "sort": "{% for i in range(9999) %}{% set x = range(99999)|sort(reverse=true) %}{% endfor %}",
    "sums": "{% for i in range(9999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "product of loops by map": "{{ range(99999)|map('string')|map('center', 9999)|list|length }}",
    "pprint": "{{ range(99999)|list|pprint|pprint|pprint }}",
    "wordcount": "{% for i in range(99999) %}{% set x = ('a ' * 500000)|wordcount %}{% endfor %}",
    "striptags": "{{ ('<' * 1000000)|striptags }}",
    "urlize": "{{ ('www.a' * 200000)|urlize }}",
    "title": "{% for i in range(9999) %}{% set x = ('a ' * 500000)|title %}{% endfor %}",
    "punycode": "{{ (('ü' * 500000) ~ 'a').encode('punycode') }}",
    "idna": "{{ ('ü' * 500000).encode('idna') }}",
    "codec of a name": "{{ 'a'.encode('x' * 1000000) }}",
    "unicode_escape": "{{ ('ü' * 1000000).encode('unicode_escape')|string|length }}",
    "utf-32": "{% set n = namespace(x=[]) %}{% for i in range(999) %}"
    "{% set n.x = n.x + [('a' * 1000000).encode('utf-32')] %}{% endfor %}",
    "kept bytes": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = [n.x, ('a' * 999999).encode()] %}{% endfor %}",
    "kept texts": "{% set n = namespace(a=0) %}"
    + "".join(f"{{% set v{i} = ('a' * 999999) ~ {i} %}}" for i in range(900)),
    "split and kept": "{% for a in range(999) %}{% set x = ('a' * 1000000).split('a') %}"
    "{% set y = x ~ x %}{% endfor %}",
    "partition": "{% for i in range(9999) %}{% set x = ('a' * 999999).partition('b') %}"
    "{% endfor %}",
    "a slow search": "{{ ('a' * 500000).find('a' * 250000 ~ 'b') }}"
    "{{ ('a' * 1000000).count('a' * 499999 ~ 'b') }}",
    "casefold": "{% set n = namespace(x='ΐ' * 999999) %}{% for i in range(99) %}"
    "{% set n.x = n.x.upper() %}{% endfor %}",
    "translate": "{{ 'x'.translate({120: 'x' * 1000000}) }}",
    "maketrans": "{{ 'x'.maketrans('x' * 1000000, 'y' * 1000000)|length }}",
    "zero division": "{{ 1 / 0 }}",
    "a float that is too large": "{{ 10.0 ** 400 }}",
    "an integer that is too long to write": "{{ 10 ** 1000 ** 1 }}",
    "a literal of 5,000 digits": "{{ " + "9" * 5000 + " }}",
}

# What is nested deeply, in the source or when it runs.
_NESTED = {
    f"{name}, {depth} deep": opening * depth + middle + closing * depth
    for depth in (90, 1000, 12_000)
    for name, opening, middle, closing in (
        ("parentheses", "(", "1", ")"),
        ("lists", "[", "1", "]"),
        ("objects", "{'a':", "1", "}"),
        ("negations", "not ", "1", ""),
        ("minus signs", "-", "1", ""),
        ("sums", "1+", "1", ""),
        ("concatenations", "1~", "1", ""),
        ("attributes", "", "x", ".x"),
        ("indices", "", "x", "[0]"),
        ("calls", "", "x", "()"),
        ("filters", "", "'x'", "|upper"),
        ("conditions", "1 if ", "1", " else 2"),
        ("comparisons", "1 < ", "1", ""),
    )
}
_BLOCKS = {
    f"blocks of {name}, {depth} deep": f"{{% {opening} %}}" * depth + f"{{% {closing} %}}" * depth
    for depth in (25, 120, 5000)
    for name, opening, closing in (
        ("if", "if true", "endif"),
        ("for", "for i in [1]", "endfor"),
        ("macro", "macro m()", "endmacro"),
        ("set", "set a", "endset"),
        ("filter", "filter upper", "endfilter"),
        ("generation", "generation", "endgeneration"),
    )
}
_RECURSIVE = {
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "a loop that calls itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a macro that calls its caller": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}"
    "{% endmacro %}{{ m() }}",
    "a list in itself": "{% set n = namespace() %}{% set n.x = n %}{{ n.x.x.x }}{{ n }}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a deep value": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}{{ n.x }}",
}

# What reaches for the program around it, or for files.
REACHING = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by attr": "{{ ''|attr('__class__') }}",
    "classes by map": "{{ ['']|map(attribute='__class__')|list }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "classes by a filter": "{{ '{0.__class__}'|format('') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of the clock": "{{ strftime_now.__globals__['datetime'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "the namespace's class": "{{ namespace.__init__.__globals__ }}",
    "a name with underscores": "{% set n = namespace(__class__=1) %}",
    "a name set later": "{% set n = namespace() %}{% set n.__dict__ = 1 %}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "from": "{% from '/etc/passwd' import x %}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame }}",
    "a change of the conversation": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "a change of a message": "{% set _ = messages[0].update({'content': 'x'}) %}",
    "mro by a property": "{{ (1).real.__class__ }}",
    "a coroutine": "{{ messages.__aiter__ }}",
}

_BROKEN = {
    "half a surrogate pair": "\ud800{{ messages[0].content }}",
    "half a surrogate pair in a string": "{{ '\udfff' }}",
    "an escaped half": r"{{ '\ud800' }}",
    "a half in a name": "{{ a\ud800 }}",
    "a null byte": "a\x00{{ '\x00' }}",
    "an open block": "{% if true %}",
    "an open expression": "{{ messages[",
    "an open comment": "{# ",
    "an unknown tag": "{% evil %}",
    "an unknown filter": "{{ 1|evil }}",
    "an unknown test": "{{ 1 is evil }}",
    "an escape that is none": r"{{ '\N{no such letter}' }}",
    "a million braces": "{" * 200_000,
    "a million comments": "{##}" * 60_000,
    "a million expressions": "{{a}}" * 50_000,
    "a million names": "".join(f"{{{{a{i}}}}}" for i in range(20_000)),
    "a long name": "{{ " + "a" * 200_000 + " }}",
    "a long text": "x" * 250_000,
    "too long a text": "x" * 300_000,
    "a strange clock": "{{ strftime_now('%' * 100000) }}",
    "a clock of lines": "{{ strftime_now('%n' * 100000) }}",
    "a clock with a null byte": "{{ strftime_now('\x00') }}",
    "a clock with a width": "{{ strftime_now('%999999999Y') }}",
    "a clock with half a pair": "{{ strftime_now('\ud800') }}",
    "an error of a million letters": "{{ raise_exception('x' * 1000000) }}",
    "an error of lines": "{{ raise_exception('a\nhint: b\x1b[2J') }}",
    "an error that is no text": "{{ raise_exception([1] * 1000000) }}",
    "debug": "{% debug %}",
    "an endless cycle": "{% set c = cycler('a') %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    "break without a loop": "{% break %}",
    "a doctype": "<!DOCTYPE x [<!ENTITY a '&b;'>]>{{ '<'|xmlattr }}",
}

TEMPLATES: Mapping[str, str] = {
    **{
        f"{name} {number}": source.replace("N", str(number))
        for name, source in _SIZED.items()
        for number in _HUGE
    },
    **{name: source.replace("LONG", _DOUBLED) for name, source in _GROWING.items()},
    **{name: f"{{{{ {expression} }}}}" for name, expression in _NESTED.items()},
    **_BLOCKS,
    **_RECURSIVE,
    **REACHING,
    **_BROKEN,
}
