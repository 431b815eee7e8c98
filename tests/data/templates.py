"""Chat templates in the shapes that published models have, and a tokenizer that knows their tokens."""

import functools

from genmodels.data import tokenizers

# Qwen: ChatML with a default system turn; earlier answers lose their reasoning, the last one opens with it.
QWEN = """{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% elif messages[0].role != 'system' %}<|im_start|>system
You are a helper.<|im_end|>
{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THINK = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +
 message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}
  {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
  {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}
  {%- endif %}
{%- endfor %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}

{% else %}{{ m.content + '<|im_end|>' }}

{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
  "qwen": QWEN, "think": THINK, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "marked": MARKED
}  # fmt: skip
SPECIAL = (
  "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
  "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}


@functools.cache
def tokenizer() -> tokenizers.FileTokenizer:
  """A small byte-level BPE with the templates' special tokens."""
  made = tokenizers.train_bpe(["the assistant says hello to the user and asks about the weather"] * 4, 300)
  made._tokenizer.add_special_tokens(list(SPECIAL))
  return tokenizers.FileTokenizer(made._tokenizer.to_str())


TALK = [
  {"role": "user", "content": "hello, what is the weather? ☂"},
  {"role": "assistant", "content": "the weather is\n\nfine  "},
  {"role": "user", "content": " and then?"},
  {"role": "assistant", "content": "ask the user"},
]
