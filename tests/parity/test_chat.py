"""Chat templates against transformers: the same text, the same ids, the same answers."""

import numpy as np
import pytest

from genmodels.contracts import TEXT
from genmodels.data import chat
from tests.data.templates import TALK, TEMPLATES, TOKENS, tokenizer
from tests.data.test_chat import documents, encoder, roles

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs():
  return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, **TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids(name, theirs):
  ours = chat.Template(TEMPLATES[name], TOKENS, name)
  for messages, prompt in ((TALK, False), (TALK[:3], True), (TALK[:1], True)):
    want = theirs.apply_chat_template(
      messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
    )
    text = ours.render(messages, generation_prompt=prompt)
    assert text == want
    ids = theirs.apply_chat_template(
      messages, chat_template=TEMPLATES[name], add_generation_prompt=prompt, return_dict=True
    )["input_ids"]
    assert tokenizer().encode_special(text).tolist() == ids


def test_tools_and_options(theirs):
  tools = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {}}}]
  want = theirs.apply_chat_template(TALK, chat_template=TEMPLATES["qwen"], tools=tools, tokenize=False)
  assert chat.Template(TEMPLATES["qwen"], TOKENS).render(TALK, tools) == want
  want = theirs.apply_chat_template(
    TALK[:1],
    chat_template=TEMPLATES["think"],
    tokenize=False,
    add_generation_prompt=True,
    enable_thinking=False,
  )
  ours = chat.Template(TEMPLATES["think"], TOKENS, options={"enable_thinking": False})
  assert ours.render(TALK[:1], generation_prompt=True) == want


def test_marked_answers(theirs):
  got = theirs.apply_chat_template(
    TALK, chat_template=TEMPLATES["marked"], return_dict=True, return_assistant_tokens_mask=True
  )
  (doc,) = documents(encoder("marked"))
  n = len(doc.tokens)  # we stop behind the last answer
  assert got["input_ids"][:n] == doc.tokens.tolist() and not any(got["assistant_masks"][n:])
  np.testing.assert_array_equal(got["assistant_masks"][:n], (roles(doc) == TEXT).astype(int))
