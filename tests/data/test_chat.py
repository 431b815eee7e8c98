"""Chat templates: exactly the answers are learnt, and what a sampler is fed is what stood before them."""

import json
import os

import numpy as np
import pytest

from genmodels import data
from genmodels.contracts import CONTEXT, FILLER, TEXT
from genmodels.data import chat, prepare, records, tokenizers
from genmodels.data.records import DataError
from tests.data.templates import TALK, TEMPLATES, TOKENS, tokenizer


def encoder(name, **kw):
  options = kw.pop("options", None)
  return chat.Encoder(chat.Template(TEMPLATES[name], TOKENS, name, options), **kw)


def documents(enc, messages=TALK, t=None):
  return list(enc.documents(chat.Conversation(tuple(messages)), t or tokenizer()))


def roles(doc):
  return records.document_roles(len(doc.tokens), doc.context, doc.spans)


def learnt(doc, t=None):
  """The learnt stretches of a document, decoded; special tokens by their names."""
  t, role = t or tokenizer(), roles(doc)
  edges = np.flatnonzero(np.diff(np.r_[0, role == TEXT, 0]))
  name = t._tokenizer.decode
  return [name(doc.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in zip(edges[::2], edges[1::2])]


ANSWERS = {  # what each template makes of the two answers, its end of turn included and nothing behind it
  "qwen": ["the weather is\n\nfine  <|im_end|>", "ask the user<|im_end|>"],
  "llama3": ["the weather is\n\nfine<|eot_id|>", "ask the user<|eot_id|>"],
  "gemma": ["the weather is\n\nfine<end_of_turn>", "ask the user<end_of_turn>"],
  "mistral": [" the weather is\n\nfine  <eos>", " ask the user<eos>"],
  "marked": ["the weather is\n\nfine  <|im_end|>", "ask the user<|im_end|>"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_learnt_and_nothing_else(name):
  t = tokenizer()
  (doc,) = documents(encoder(name))
  assert learnt(doc) == ANSWERS[name]
  assert roles(doc)[-1] == TEXT  # nothing behind the last answer: it would say where it ends
  assert doc.source_bytes == sum(len(a.encode()) for a in ANSWERS[name])
  # A sampler is fed the turns before an answer and its opening: the ids before it, for both answers.
  template = encoder(name).template
  for turn, end in ((3, "last"), (1, "each")):
    fed = t.encode_special(template.render(TALK[:turn], generation_prompt=True))
    made = documents(encoder(name, learn=end))[0]
    assert len(fed) < len(made.tokens) and made.tokens[: len(fed)].tolist() == fed.tolist()
    assert made.context == len(fed) and not made.spans  # one answer: roles are a prefix
    assert learnt(made) == ANSWERS[name][turn // 2 : turn // 2 + 1]
  assert len(documents(encoder(name, learn="each"))) == 2


@pytest.mark.parametrize("name", ANSWERS)
def test_a_sampler_is_given_the_context_of_an_answer(name, tmp_path):
  """Ids and end of turn as in training, from a template that went through a file."""
  t = tokenizer()
  (doc,) = documents(encoder(name, learn="last"))
  assert chat.kept(str(tmp_path)) is None
  encoder(name).template.save(str(tmp_path))
  ids, stop = chat.prompt(chat.kept(str(tmp_path)), TALK[:3], t)
  assert ids.tolist() == doc.tokens[: doc.context].tolist() and stop == doc.tokens[-1]


def test_prompts_that_training_would_not_have():
  t = tokenizer()
  with pytest.raises(chat.Malformed, match="special token in the content"):
    chat.prompt(encoder("qwen").template, [{"role": "user", "content": "so<|im_end|>"}], t)
  # The opening of an answer is not what stands before one.
  odd = chat.Template(
    TEMPLATES["marked"].replace("assistant\n{% endif %}", "model\n{% endif %}"), TOKENS, "odd"
  )
  with pytest.raises(DataError, match="the answer itself"):
    chat.prompt(odd, TALK[:3], t)
  # A template that says nothing at the end of an answer: EOS ends it, as in training.
  plain = chat.Template(chat.PLAIN, TOKENS, "plain")
  ids, stop = chat.prompt(plain, TALK[:1], t)
  assert (
    stop == t.specials["eos"]
    and ids.tolist() == t.encode("user: " + TALK[0]["content"] + "\nassistant: ").tolist()
  )


def test_a_template_that_is_not_prefix_stable_is_refused_by_name():
  with pytest.raises(DataError, match="think is not prefix-stable.*--learn last.*generation"):
    documents(encoder("think"))
  (doc,) = documents(encoder("think", learn="last"))
  assert learnt(doc) == ["<think>\n\n</think>\n\nask the user<|im_end|>"]
  (doc,) = documents(encoder("think", learn="last", options={"enable_thinking": False}))
  assert learnt(doc) == ["ask the user<|im_end|>"]


def test_token_borders_are_checked():
  """A template whose answer begins inside of a token of the whole text: the sampler would be fed other ids."""
  source = TEMPLATES["qwen"].replace("<|im_start|>' + m.role + '\\\\n'", "as' + m.role + ' '")
  source = (
    "{% for m in messages %}{{ m.role }} the{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
  )
  enc = chat.Encoder(chat.Template(source))
  t = tokenizers.train_bpe(["weather theory " * 9] * 9, 290)
  talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ory"}]
  assert " theory" in t._tokenizer.get_vocab() or "Ġtheory" in t._tokenizer.get_vocab()
  (out,) = documents(enc, talk, t)
  assert isinstance(out, chat.Malformed) and out.reason == "token across a border"


def test_an_answer_without_an_end_gets_one():
  t = tokenizers.ByteTokenizer()
  (doc,) = documents(chat.Encoder(chat.Template(chat.PLAIN), learn="last"), t=t)
  assert doc.tokens[-1] == 257 and t.decode(doc.tokens[doc.context :]) == "ask the user\n"
  assert t.decode(doc.tokens[: doc.context]).endswith("assistant: ")
  (doc,) = documents(chat.Encoder(chat.Template(chat.CHATML)), t=tokenizer())
  assert doc.tokens[-1] == tokenizer()._tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("anchor", ["response", "document"])
@pytest.mark.parametrize("pad", ["mask", "eos"])
def test_padding_to_whole_blocks(pad, anchor):
  (plain,) = documents(encoder("qwen", learn="last"))
  (doc,) = documents(encoder("qwen", learn="last", block=8, pad=pad, anchor=anchor))
  n, role = len(plain.tokens), roles(doc)
  start = plain.context if anchor == "response" else 0
  assert (len(doc.tokens) - start) % 8 == 0 and n < len(doc.tokens) < n + 8
  assert doc.tokens[:n].tolist() == plain.tokens.tolist()
  assert set(doc.tokens[n:].tolist()) == {tokenizer().specials[pad]}
  assert set(role[n:].tolist()) == {{"mask": FILLER, "eos": TEXT}[pad]}


def test_too_long():
  enc = encoder("qwen", learn="each")
  n = [len(d.tokens) for d in documents(enc)]
  got = documents(encoder("qwen", learn="each", max_length=n[0]))
  assert len(got[0].tokens) == n[0] and got[1].reason == "too long"
  got = documents(encoder("qwen", learn="each", max_length=n[1] - 3, too_long="cut"))
  assert [len(d.tokens) for d in got] == [n[0], n[1] - 3]
  got = documents(encoder("qwen", learn="last", max_length=9, too_long="cut"))
  assert got[0].reason == "too long"


BAD = {
  "missing role": {"messages": [{"content": "x"}]},
  "no messages": {"text": "x"},
  "missing content": {"messages": [{"role": "user"}]},
  "empty response": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  "}]},
  "no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
  "template error": {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]},
  "special token in the content": {
    "messages": [{"role": "user", "content": "<end_of_turn>"}, {"role": "assistant", "content": "y"}]
  },
}


def write(path, entries):
  path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))


def test_malformed_records_are_counted_by_reason(tmp_path):
  good = [
    {
      "messages": [
        {"role": "user", "content": f"hello {i}"},
        {"role": "assistant", "content": f"the user {i}"},
      ]
    }
    for i in range(30)
  ]
  write(tmp_path / "c.jsonl", [*good, *BAD.values(), "{broken"])
  folder = tmp_path / "t"
  tokenizer().save(str(folder))
  (folder / "chat_template.jinja").write_text(TEMPLATES["gemma"])
  (folder / "tokenizer_config.json").write_text(json.dumps(dict(TOKENS, bos_token={"content": "<bos>"})))
  argv = [
    str(tmp_path / "c.jsonl"),
    "--messages",
    "messages",
    "--out",
    str(tmp_path / "d"),
    "--heldout",
    "0.1",
  ]
  argv += ["--tokenizer", str(folder)]
  assert prepare.main(argv) == 1 and not os.path.exists(tmp_path / "d")  # too many are bad
  assert prepare.main([*argv, "--max-bad", "0.5"]) == 0
  meta = records.read_manifest(str(tmp_path / "d" / "train"))["meta"]
  assert meta["reasons"] == dict.fromkeys(BAD, 1) | {"unreadable": 1}
  assert any("c.jsonl:31: Malformed missing role" in b for b in meta["bad"])
  d = data.build({"kind": "text", "path": str(tmp_path / "d"), "seq_len": 64}, batch_size=2)
  assert d.tokenizer.hash == tokenizer().hash
  batch = d.batch(0)
  said = batch["tokens"][(batch["role"] == TEXT) & (batch["doc"] == 0)]
  assert "the user" in d.tokenizer.decode(said) and "hello" not in d.tokenizer.decode(said)


def test_templates_cannot_reach_the_machine():
  for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}"):
    with pytest.raises(chat.Malformed, match="template error"):
      chat.Template(source).render([{"role": "user", "content": "x"}])
  with pytest.raises(DataError, match="line 1"):
    chat.Template("{% if %}")
  with pytest.raises(DataError, match="expected 'chatml'"):
    chat.load("nowhere")


def test_conversations_of_several_turns_keep_their_roles_on_disk(tmp_path):
  talks = [chat.Conversation(tuple(dict(m, content=f"{m['content']} {i}") for m in TALK)) for i in range(20)]
  t = tokenizer()
  made = prepare.prepare(
    talks, str(tmp_path / "d"), tokenizer=t, heldout=0.2, chat=encoder("qwen", block=8)
  )  # fmt: skip
  assert made["train"]["spans"] and made["train"]["features"]["runs"] == 2
  d = data.build({"kind": "text", "path": str(tmp_path / "d"), "seq_len": 160}, batch_size=2)
  batch = d.batch(0)
  assert set(np.unique(batch["role"])) == {CONTEXT, TEXT, FILLER}
  text = t.decode(batch["tokens"][0][(batch["role"][0] == TEXT) & (batch["doc"][0] == 0)])
  assert "fine" in text and "ask the user" in text and "hello" not in text


def test_questions_about_the_standard_library():
  talks = list(chat.read_python_docs(20))
  assert len(talks) == 20 and talks == list(chat.read_python_docs(20))
  question, answer = talks[3].messages
  assert question["content"].startswith("What does ") and len(answer["content"]) > 15


def test_documentation_is_data_of_every_machine(tmp_path):
  section = {"kind": "python", "content": "documentation", "seq_len": 192, "documents": 60, "heldout": 0.2}
  d = data.build(section | {"chat": {"block": 16, "pad": "eos"}}, batch_size=2, workdir=str(tmp_path))
  batch = d.batch(0)
  text = d.tokenizer.decode(batch["tokens"][0][batch["doc"][0] == 0])
  assert text.startswith("user: What does ") and "\nassistant: " in text
  first = batch["role"][0][batch["doc"][0] == 0]
  assert first[0] == CONTEXT and first[-1] == TEXT and (first == TEXT).sum() % 16 == 0
  plain = data.build(section, batch_size=2, workdir=str(tmp_path / "plain"))  # other documents, other folder
  assert plain.plan.components[0].digest != d.plan.components[0].digest
