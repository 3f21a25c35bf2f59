"""Unusual files, as users and programs write them, and folders with unusual names."""

from __future__ import annotations

from typing import Final

W: Final = "/runs/a project"
FOLDERS: Final = {
    "plain": W,
    "quotes": '/runs/it\'s "quoted"',
    "double quotes": '/runs/"',
    "backslashes": "/runs/a\\b\\",
    "unicode": "/wörk/日本/😀",
    "newline": "/runs/a\nb\r\nc",
    "controls": "/runs/\x01\x1f\x7f\x85\u2028",
    "dots": "/runs/a.b.c",
    "brackets": "/runs/[x]#{y}=",
    "root": "/",
}

CODEX: Final = {
    "no file": None,
    "empty": b"",
    "byte-order mark alone": b"\xef\xbb\xbf",
    "blank": b" \n\t\n",
    "blank without a line end": b"   ",
    "one line": b"a = 1\n",
    "one line, not ended": b"a = 1",
    "comment, not ended": b"# nothing else",
    "crlf": b"a = 1\r\n\r\n# c\r\n[t]\r\nb = 2\r\n",
    "crlf, not ended": b"a = 1\r\n[t]\r\nb = 2",
    "mixed line ends": b"a = 1\r\nb = 2\n[t]\r\n\n\r\n",
    "byte-order mark": b'\xef\xbb\xbfmodel = "m"\n',
    "comments everywhere": b'# top\n\n  # in\n[ projects . "/x" ] # of x\n# in x\n'
    b'trust_level = "trusted" # yes\n# after\n\n# before t\n[t] # t\n# end',
    "headers": b'[projects."/x"]\ntrust_level = "trusted"\n\n[projects."/y"]\n'
    b'trust_level = "untrusted"\n',
    "parent header": b'[projects]\n[projects."/x"]\ntrust_level = "trusted"\n',
    "dotted in the root": b'projects."/x".trust_level = "trusted" # x\n\n[t]\nprojects = 1\n',
    "dotted in the root, not ended": b'projects."/x".trust_level = "trusted"',
    "dotted below a header": b'[projects]\n  "/x".trust_level = "trusted"\r\n\n[t]\n',
    "inline projects": b'projects = { "/x" = { trust_level = "trusted" } } # c\n[t]\n',
    "inline projects, tight": b'projects={"/x"={trust_level="trusted"}}',
    "empty inline projects": b"projects = {}\n",
    "blank inline projects": b"projects = { }\n",
    "inline with dotted keys": b'projects = { "/x".trust_level = "trusted", "/y".z = 1 }',
    "inline entries": b"[projects]\n'/x' = { trust_level = 'trusted' }\n",
    "our table without a level": b'[projects."/runs/a project"]\nother = 1 # c\n\n[t]\n',
    "our table, indented": b'[projects."/runs/a project"]\n\n\t# c\n\tother = 1\n',
    "our table, empty, not ended": b'[projects."/runs/a project"]',
    "our table, empty, crlf": b'[projects."/runs/a project"]  # c\r\n[t]\r\n',
    "our table, literal": b"[projects.'/runs/a project']\n",
    "our table, escaped": b'["projects" . "/runs/a\\u0020project"]\n',
    "our table by its sub-table": b'[projects."/runs/a project".sub]\na = 1\n',
    "our table and its sub-table": b'[projects."/runs/a project".sub]\na = 1\n'
    b'[projects."/runs/a project"]\nb = 1\n',
    "our dotted key": b'projects."/runs/a project".other = 1\nz = 2\n',
    "our dotted key, spaced": b"projects . '/runs/a project' . other = 1",
    "our deep dotted key": b'[projects]\n"/runs/a project".a.b = 1\n"/z".c = 1\n',
    "our inline table": b'[projects]\n"/runs/a project" = { other = 1 }\n',
    "our empty inline table": b'projects."/runs/a project" = {}',
    "our dotted key, inline": b'projects = { "/runs/a project".other = [ 1, {a = 2} ] }\n',
    "untrusted by header": b'[projects."/runs/a project"]\ntrust_level = \'untrusted\' # no\n',
    "untrusted, dotted": b'projects."/runs/a project".trust_level="untrusted"',
    "untrusted, inline": b'projects = { "/runs/a project" = { trust_level = "untrusted" } }',
    "untrusted, in lines": b'[projects."/runs/a project"]\ntrust_level = """\\\n  unt"rusted"""\n',
    "strings that look like it": b'a = """\n[projects."/runs/a project"]\ntrust_level = "x"\n"""\n'
    b"b = '''\n[projects]\n''''\nc = \"[projects] # \\\" \"\nd = [ # [\n '#]', \"]\",\n]\n",
    "quotes at the ends": b'a = """"quoted""""\nb = \'\'\'\'\'\'\nc = """a"""""\nd = ""\n',
    "arrays of tables": b"[[servers]]\na = 1\n[[servers]]\n[servers.projects]\nb = 1\n",
    "every kind of value": b"a = 1979-05-27 07:32:00Z\nb = inf\nc = nan\nd = 0x1F\ne = 1_000.5e-3\n"
    b"f = [1979-05-27 07:32:00, true,]\ng = 07:32:00\n",
    "form of quoted words": b"\"projects x\" = 1\n'projects' . 'y' . z = 2\n",
}  # fmt: skip

GEMINI: Final = {
    "no file": None,
    "empty": b"",
    "byte-order mark alone": b"\xef\xbb\xbf",
    "blank": b" \r\n\t",
    "nothing": b"{}",
    "nothing, ended": b"{}\n",
    "nothing, spaced": b"  { }  \n\n",
    "nothing, in lines": b"{\r\n}\r\n",
    "nothing, indented": b"{\n\t\t}\n",
    "one": b'{"/x": "TRUST_FOLDER"}',
    "one, tight": b'{"/x":"DO_NOT_TRUST"}',
    "in lines": b'{\n  "/x": "TRUST_FOLDER",\n  "/y": "TRUST_PARENT"\n}\n',
    "crlf and tabs": b'{\r\n\t"/x"\t:\t"TRUST_FOLDER"\r\n\t}\r\n',
    "mixed line ends": b'{\r\n "/x": "TRUST_FOLDER",\n "/y": 1\r\n,\n\n"/z" :2}',
    "leading commas": b'{\n  "/x": "TRUST_FOLDER"\n, "/y": "TRUST_FOLDER"\n}',
    "byte-order mark": b'\xef\xbb\xbf{\n  "/x": "TRUST_FOLDER"\n}',
    "duplicates": b'{"/x": 1, "/x": 2, "/y": 3, "/x": 1.0, "/x": 1.00}',
    "distrusted": b'{ "/z" : 1 ,  "/runs/a project" : "DO_NOT_TRUST" , "/x" : {} }',
    "distrusted, escaped": b'{"\\/runs/a\\u0020project": "DO_NOT\\u005fTRUST"}',
    "distrusted twice": b'{"/runs/a project": "DO_NOT_TRUST", "/runs/a project": "DO_NOT_TRUST"}',
    "null": b'{"/runs/a project": null}',
    "surrogates": b'{"/\\ud800": "\\udfff", "/\xf0\x9f\x98\x80": "\\ud83d\\ude00"}',
    "numbers": b'{"a": 1e400, "b": -0, "c": 0.10, "d": ' + b"9" * 5000 + b"}",
    "looks like it": b'{"x": "{\\"/runs/a project\\": \\"TRUST_FOLDER\\"}", "y": ["/runs", "}"]}',
}  # fmt: skip

CLAUDE: Final = {
    "no file": None,
    "empty": b"",
    "nothing": b"{}",
    "nothing, in lines": b"{\n}\n",
    "others": b'{\n  "numStartups": 3,\n  "tips": {"a": [1, 2]}\n}',
    "others, crlf": b'{\r\n    "numStartups": 3\r\n}\r\n',
    "no projects": b'{"projects": {}}',
    "no projects, in lines": b'{\n  "a": 1,\n  "projects": {\n  },\n  "b": 2\n}\n',
    "other projects": b'{\n  "projects": {\n    "/x": {\n      "allowedTools": [],\n'
    b'      "hasTrustDialogAccepted": true\n    }\n  },\n  "userID": "u"\n}\n',
    "ours, without": b'{"projects": {"/runs/a project": {"allowedTools": [ ]} , "/x":{}}}',
    "ours, empty": b'{\n\t"projects": {\n\t\t"/runs/a project": {}\n\t}\n}',
    "ours, distrusted": b'{"projects":{"/runs/a project":{"hasTrustDialogAccepted" : false }}}',
    "ours, null": b'{"projects":{"/runs/a project":{"hasTrustDialogAccepted":null,"b":1}}}',
    "projects twice": b'{"projects": {"/runs/a project": {"hasTrustDialogAccepted": true}}, '
    b'"projects": {"/x": {}}, "c": 1}',
    "byte-order mark": b'\xef\xbb\xbf{"projects": {"/x": {"hasTrustDialogAccepted": true}}}\r\n',
}  # fmt: skip
