"""Conversations: a chat template renders them, and the assistant's words, exactly those, are learnt.

  genmodels prepare chats.jsonl --messages messages --out data/chat --tokenizer runs/qwen3

A record is {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}. The
template is the one that came with the checkpoint (Hugging Face's Jinja convention), rendered in a sandbox.

What is learnt is found by rendering, not by searching: a template marks it with {% generation %}, or the
turns before an answer, rendered with the generation prompt, must begin the whole text; what follows is the
answer. The tokens before an answer must be those of the text before it alone: a sampler is fed exactly them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import sysconfig
import tokenize
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from genmodels.data.records import CONTEXT, FILLER, TEXT, DataError, Document

LEARN = ("all", "last", "each")
TOO_LONG = ("drop", "cut")
PADS = ("mask", "eos")
ANCHORS = ("response", "document")
ASSISTANT = "assistant"
KEPT = "chat.json"  # beside prepared data: the template that rendered them

# For tokenizers that come without a template: the layout that most published models derive from, and one that
# needs no tokens of its own.
CHATML = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
  "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PLAIN = (
  "{% for message in messages %}{{ message.role }}: "
  "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}\n{% endgeneration %}"
  "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
NAMED = {"chatml": CHATML, "plain": PLAIN}


class Malformed(ValueError):
  """A record that is left out and counted under `reason`."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A record of turns.

  Fields:
    messages: [{"role": …, "content": …, …}, …] as the template takes them.
    tools: tool descriptions for the template, or None.
    where: the record's name, for messages.
  """

  messages: tuple[dict, ...]
  tools: Any = None
  where: str = ""

  @classmethod
  def of(cls, fields: Mapping, name: str, where: str = "") -> Conversation:
    """The conversation in field `name` of a record. Raises Malformed."""
    turns = fields.get(name)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
      raise Malformed("no messages", f"field {name!r} is {type(turns).__name__}, expected a list of turns")
    for i, turn in enumerate(turns):
      if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not turn["role"]:
        raise Malformed("missing role", f"turn {i} names no role")
      content = turn.get("content")
      if not isinstance(content, str | list) and not (content is None and turn.get("tool_calls")):
        raise Malformed("missing content", f"turn {i} ({turn['role']}) has no text")
      if turn["role"] == ASSISTANT and not turn.get("tool_calls") and not str(content).strip():
        raise Malformed("empty response", f"turn {i}")
    if all(turn["role"] != ASSISTANT for turn in turns):
      raise Malformed("no assistant turn", f"roles {sorted({t['role'] for t in turns})}")
    return cls(
      tuple({k: v for k, v in t.items() if v is not None} for t in turns), fields.get("tools"), where
    )

  @property
  def text(self) -> str:
    """All that was said, for training a tokenizer and for the choice of held-out records."""
    return "\n".join(str(turn.get("content", "")) for turn in self.messages)


class _Generation(jinja2.ext.Extension):
  """{% generation %} … {% endgeneration %}: puts `open` and `close` of the environment around the body."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

  def _mark(self, caller):
    return self.environment.marks[0] + caller() + self.environment.marks[1]


class Template:
  """A chat template.

  Args:
    source: Jinja text. tokens: {"bos_token": "<s>", …}, what the template may call special tokens by.
    name: for messages. options: further variables (enable_thinking, date_string).

  `strftime_now` is not defined: the same input shall give the same data on any day. Templates that ask for it
  fall back to a date of their own, or to `options`.

  Raises: DataError if the text is no template.
  """

  def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "", options=None):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.extend(marks=("", ""))
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _tojson
    self.name, self.source, self.tokens = name, source, dict(tokens or {})
    self._options, self._environment = dict(options or {}), environment
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
      raise DataError(f"chat template {name}, line {e.lineno}: {e.message}") from e
    self.marked = bool(re.search(r"{%-?\+?\s*generation\b", source))

  def render(self, messages, tools=None, generation_prompt: bool = False) -> str:
    """The text of turns, with the assistant's opening behind them where asked for. Raises Malformed."""
    try:
      return self._template.render(
        messages=[dict(m) for m in messages], tools=tools, documents=None,
        add_generation_prompt=generation_prompt, **{**self.tokens, **self._options},
      )  # fmt: skip
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
      raise Malformed("template error", f"{type(e).__name__} {e}") from e

  def learnt(self, messages, tools=None, last: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation that ends with an assistant's turn, and the intervals of it that are learnt.

    Args:
      last: of the last turn only.

    Raises: Malformed; DataError if nothing but the template is at fault.
    """
    if self.marked:
      text, spans = self._between_marks(messages, tools)
      return text, spans[-1:] if last else spans
    text, spans = self.render(messages, tools), []
    turns = [i for i, turn in enumerate(messages) if turn["role"] == ASSISTANT]
    for i in turns[-1:] if last else turns:
      given = self.render(messages[:i], tools, generation_prompt=True)
      whole = self.render(messages[: i + 1], tools)
      if not whole.startswith(given) or not text.startswith(whole):
        at = len(os.path.commonprefix([given, whole] if not whole.startswith(given) else [whole, text]))
        raise DataError(
          f"chat template {self.name} is not prefix-stable: turn {i} does not read the same when it is the "
          f"last one (from {text[max(at - 20, 0) : at + 20]!r}), so what a sampler will see before it is not "
          "what is trained on. Learn one answer a document (--learn last, or each), or mark the answers in "
          "the template with {% generation %} and give it with --template FILE"
        )
      spans.append((len(given), len(whole)))
    return text, spans

  def _between_marks(self, messages, tools):
    """Text and spans of the {% generation %} bodies. The marks are new each time: no text can spell them."""
    token = uuid.uuid4().hex
    self._environment.marks = f"[{token}(", f"){token}]"
    try:
      parts = re.split(rf"\[{token}\(|\){token}\]", self.render(messages, tools))
    finally:
      self._environment.marks = "", ""
    if len(parts) % 2 == 0:
      raise DataError(f"chat template {self.name}: {{% generation %}} blocks are nested")
    edges = np.cumsum([len(p) for p in parts])
    return "".join(parts), [(int(edges[i]), int(edges[i + 1])) for i in range(0, len(parts) - 1, 2)]

  def save(self, folder: str) -> None:
    """Writes the template and its variables, so that a sampler renders as the data were rendered."""
    with open(os.path.join(folder, KEPT), "w") as f:
      json.dump({"template": self.source, "tokens": self.tokens, "options": self._options}, f, indent=1)


def kept(folder: str) -> Template | None:
  """The template that data in `folder` were rendered with; None where they are no conversations."""
  stored = _json(os.path.join(folder, KEPT)) if folder else {}
  name = os.path.join(folder, KEPT)
  return Template(stored["template"], stored["tokens"], name, stored["options"]) if stored else None


def prompt(template: Template, messages: Sequence[Mapping], tokenizer, tools=None) -> tuple[np.ndarray, int]:
  """Ids of turns up to an answer, as training gives them, and the id that ends the answer.

  Raises: Malformed; DataError if the template reads otherwise once the answer is there.
  """
  _no_specials(messages, tokenizer)
  answered = (*messages, {"role": ASSISTANT, "content": "answer"})
  given = template.render(messages, tools, generation_prompt=True)
  text, spans = template.learnt(answered, tools, last=True)
  if not spans or text[: spans[-1][0]] != given:
    found = text[: spans[-1][0] if spans else 40][-40:]
    raise DataError(
      f"chat template {template.name}: the turns before an answer end with {given[-40:]!r}, but before the "
      f"answer itself stands {found!r}"
    )
  names, (a, b) = tokenizer.special_names(), spans[-1]
  end = _stop(text, a, b, names)
  ends = [n for n in names if text.endswith(n, a, end)]
  stop = int(tokenizer.encode_special(max(ends, key=len))[-1]) if ends else tokenizer.specials["eos"]
  return np.asarray(tokenizer.encode_special(given), np.int32), stop


def _no_specials(messages, tokenizer) -> None:
  """Raises Malformed for turns that spell a special token: they would end a turn, or begin one."""
  for i, turn in enumerate(messages):
    if found := [n for n in tokenizer.special_names() if n in str(turn.get("content", ""))]:
      raise Malformed("special token in the content", f"turn {i} spells {found[0]!r}")


def _raise(message):
  raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def load(name: str, folder: str = "", options: Mapping | None = None) -> Template:
  """A template: "chatml", "plain", a Jinja file, a folder with one, or "" for the tokenizer's own.

  Args:
    folder: of the tokenizer; chat_template.jinja, or the key in tokenizer_config.json. Without either: plain.

  Raises: DataError if there is none where one is named.
  """
  folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
  tokens = _token_names(folder)
  if name in NAMED:
    return Template(NAMED[name], tokens, name, options)
  if os.path.isfile(name):
    with open(name) as f:
      return Template(f.read(), tokens, name, options)
  where = name or folder
  if where and os.path.isfile(path := os.path.join(where, "chat_template.jinja")):
    with open(path) as f:
      return Template(f.read(), tokens, path, options)
  path = os.path.join(where, "tokenizer_config.json")
  source = _json(path).get("chat_template") if where else None
  if isinstance(source, list):  # several by name
    source = {entry["name"]: entry["template"] for entry in source}.get("default")
  if source:
    return Template(source, tokens, path, options)
  if name:
    raise DataError(
      f"chat template {name!r}: expected 'chatml', 'plain', a Jinja file, or a folder with a template"
    )
  return Template(PLAIN, tokens, "plain", options)


def _token_names(folder) -> dict[str, str]:
  """{"bos_token": "<s>", …} of a tokenizer's folder."""
  out = {}
  for file in ("special_tokens_map.json", "tokenizer_config.json"):
    for key, value in _json(os.path.join(folder, file)).items():
      value = value.get("content") if isinstance(value, dict) else value
      if key.endswith("_token") and isinstance(value, str):
        out[key] = value
  return out


def _json(path) -> dict:
  if not os.path.isfile(path):
    return {}
  with open(path) as f:
    return json.load(f)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Conversations to documents.

  Fields:
    template: of the tokenizer.
    learn: "all" answers of a conversation in one document; its "last" one; "each" in a document of its own,
      with all turns before it given. A full-attention model that learns several answers at once sees from the
      turns behind an answer how long it is: "last" and "each" are for it.
    max_length: tokens of a document, 0: any. too_long: "drop" the document, or "cut" its end, as long as
      something is left to learn.
    block: pad the document to whole blocks of this length, 0: not. pad: with "mask", tokens that stay as they
      are (Fast-dLLM v2), or "eos", which are learnt (LLaDA, DiffusionVL).
    anchor: what the blocks are counted from, as of corruption.blocks: "response" or "document".
  """

  template: Template
  learn: str = "all"
  max_length: int = 0
  too_long: str = "drop"
  block: int = 0
  pad: str = "mask"
  anchor: str = "response"

  def __post_init__(self):
    for name, allowed in (
      ("learn", LEARN),
      ("too_long", TOO_LONG),
      ("pad", PADS),
      ("anchor", ANCHORS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

  def documents(self, talk: Conversation, tokenizer) -> Iterator[Document | Malformed]:
    """Documents of a conversation, in order, or why there is none."""
    turns = [i for i, turn in enumerate(talk.messages) if turn["role"] == ASSISTANT]
    for i in turns if self.learn == "each" else turns[-1:]:
      try:
        yield self._document(talk, talk.messages[: i + 1], tokenizer)
      except Malformed as e:
        yield e

  def _document(self, talk, messages, tokenizer) -> Document:
    names = tokenizer.special_names()
    _no_specials(messages, tokenizer)
    text, spans = self.template.learnt(messages, talk.tools, last=self.learn != "all")
    spans = [(a, _stop(text, a, b, names)) for a, b in spans]
    if not spans or any(a >= b for a, b in spans):
      raise Malformed("empty response", "the template renders an answer to nothing")
    end = spans[-1][1]  # what a template puts behind the last answer would tell where it ends
    ids = list(tokenizer.encode_special(text[:end]))
    role = np.full(len(ids), CONTEXT)
    for a, b in spans:
      first, last = (self._border(tokenizer, text, ids, at) for at in (a, b))
      role[first:last] = TEXT
    special = tokenizer.specials
    if not any(text.endswith(n, 0, end) for n in names):  # nothing says that the answer is over
      ids, role = [*ids, special["eos"]], np.append(role, TEXT)
    ids, role = self._padded(ids, role, special)
    if self.max_length and len(ids) > self.max_length:
      if self.too_long == "drop":
        raise Malformed("too long", f"{len(ids)} tokens, max_length {self.max_length}")
      ids, role = ids[: self.max_length], role[: self.max_length]
      if not (role == TEXT).any():
        raise Malformed("too long", f"the prompt alone has {self.max_length} tokens or more")
      ids, role = (
        ids[: np.flatnonzero(role != CONTEXT)[-1] + 1],
        role[: np.flatnonzero(role != CONTEXT)[-1] + 1],
      )
    size = sum(len(text[a:b].encode("utf-8", "replace")) for a, b in spans)
    return _with_roles(np.asarray(ids, np.int32), role, size)

  def _border(self, tokenizer, text, ids, at) -> int:
    """How many tokens text[:at] has; they must begin the ids of the whole text."""
    head = tokenizer.encode_special(text[:at])
    if list(head) != ids[: len(head)]:
      raise Malformed(
        "token across a border",
        f"{text[max(at - 12, 0) : at + 12]!r} is not encoded as what a sampler is fed",
      )
    return len(head)

  def _padded(self, ids, role, special):
    if not self.block:
      return ids, role
    start = 0
    if self.anchor == "response":
      given = np.flatnonzero(role == CONTEXT)
      start = int(given[-1]) + 1 if len(given) else 0
    more = -(len(ids) - start) % self.block
    value = {"mask": FILLER, "eos": TEXT}[self.pad]
    return [*ids, *[special[self.pad]] * more], np.append(role, np.full(more, value))


def _stop(text: str, a: int, b: int, names) -> int:
  """The end of an answer: behind its last special token, if only white space follows it."""
  ends = [at + len(n) for n in names if (at := text.rfind(n, a, b)) >= 0]
  last = max(ends, default=b)
  return last if not text[last:b].strip() else b


def _with_roles(ids, role, size) -> Document:
  """A document whose roles are a prefix where they can be, else spans."""
  given = int(np.argmax(role != CONTEXT))
  if (role[given:] == TEXT).all():
    return Document(ids, context=given, source_bytes=size)
  edge = np.flatnonzero(np.diff(role, prepend=-1))
  spans = tuple(
    (int(i), int(j), int(role[i]))
    for i, j in zip(edge, [*edge[1:], len(role)], strict=True)
    if role[i] != TEXT
  )
  return Document(ids, spans=spans, source_bytes=size)


# ------------------------------------------------------------------------- a data set of every machine


def read_python_docs(documents: int = 0) -> Iterator[Conversation]:
  """Questions about the public functions of the Python standard library, answered by their documentation.

  The signature is asked for, the first paragraph of the docstring is the answer. In sorted order; `documents`
  takes the first so many (0: all).
  """
  root, taken = sysconfig.get_paths()["stdlib"], 0
  for name in sorted(os.listdir(root)):
    if not re.fullmatch(r"[a-z]\w*\.py", name):
      continue
    try:
      with tokenize.open(os.path.join(root, name)) as f:
        tree = ast.parse(f.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
      continue
    module = name.removesuffix(".py")
    for node in tree.body:
      if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        continue
      doc = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
      if len(doc) < 16:
        continue
      question = f"What does {module}.{node.name}({ast.unparse(node.args)}) do?"
      turns = {"role": "user", "content": question}, {"role": ASSISTANT, "content": doc}
      yield Conversation(turns, None, f"{module}.{node.name}")
      taken += 1
      if taken == documents:
        return
