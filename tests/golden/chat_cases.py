"""Chat templates with the constructs of many model families, and chats for them.

``scripts/make_text_golden`` has transformers render the chats; the tests compare with what it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

CHATS_FILE = Path(__file__).parent / "chats.json"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<|begin|>"}


class TemplateCase(NamedTuple):
    """A template, and the form of a message's content that it is written for."""

    source: str
    content: Literal["text", "parts", "both", "both_for_users"] = "text"

    def content_of(self, role: str, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        """Return ``content`` in a form that this template is written for."""
        both = self.content == "both" or (self.content == "both_for_users" and role == "user")
        if both or isinstance(content, list) == (self.content == "parts"):
            return content
        if isinstance(content, list):
            return "\n".join(part["text"] for part in content)
        return [{"type": "text", "text": content}]


class Chat(NamedTuple):
    """Messages as a client sends them, and how they are rendered."""

    messages: list[dict[str, Any]]
    options: Mapping[str, Any] = {"add_generation_prompt": True}
    variables: Mapping[str, Any] = {}


_CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_QWEN = """
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(asked=false, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.asked and message.role == "user" and message.content is string %}
        {%- set ns.asked = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

_LLAMA3 = """
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("today") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nDate: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""

_MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("call ids should have 9 characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}
        {{- raise_exception("only user, assistant and tool roles, after a system message") }}
    {%- endif %}
{%- endfor %}
"""

_HERMES = """
{%- macro call_of(call) -%}
    {%- if call.function is defined %}{%- set call = call.function %}{%- endif -%}
    <tool_call>{"arguments": {{ call.arguments|tojson(sort_keys=true) }}, "name": "{{ call.name }}"}</tool_call>
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system"
        or (message.role == "assistant" and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is defined and message.content is not none %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}{{- '\\n' + call_of(tool_call) }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>tool\\n' }}{%- endif %}
        {{- '<tool_response>\\n' }}{{- message.content }}
        {%- if not loop.last %}{{- '\\n</tool_response>\\n' }}{%- else %}{{- '\\n</tool_response>' }}{%- endif %}
        {%- if not loop.last and loop.nextitem.role != "tool" %}{{- '<|im_end|>' }}{%- elif loop.last %}
            {{- '<|im_end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_GEMMA = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

_PHI = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'tool'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

_DEEPSEEK = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(is_first=true, is_tool=false, system_prompt='') -%}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if ns.is_first %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first = false %}
        {%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}
    {%- endif %}
{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}
        {%- set ns.is_tool = false -%}
        {%- for tool in message['tool_calls'] %}
            {%- if loop.first %}{{ '<｜Assistant｜>' }}{%- endif %}
            {{- tool['type'] + '<sep>' + tool['function']['name'] + '\\n' + tool['function']['arguments']|tojson }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{%- endif %}
        {{- ('' if ns.is_tool else '<｜Assistant｜>') + content + eos_token }}
        {%- set ns.is_tool = false %}
    {%- endif %}
    {%- if message['role'] == 'tool' %}
        {%- set ns.is_tool = true -%}
        {{ '<｜tool▁output｜>' + message['content'] + '<｜end｜>' }}
    {%- endif %}
{%- endfor -%}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

_ERNIE = """
{%- if not cls_token is defined %}{%- set cls_token = "<|wrong|>" %}{%- endif %}
{{- cls_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}{{- "User: " + message["content"] + "\\n" }}
    {%- elif message["role"] == "assistant" %}{{- "Assistant: " + message["content"] + eos_token }}
    {%- elif message["role"] == "system" %}{{- message["content"] + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant: " }}{%- endif %}
"""

_COMMAND = """
{%- macro document_turn(documents) -%}
<|START|><|SYSTEM|><results>
{% for document in documents %}
Document: {{ loop.index0 }}
{% for key, value in document.items() %}{{ key }}: {{ value }}{% if not loop.last %}, {% endif %}{% endfor %}

{% endfor -%}
</results><|END|>
{%- endmacro -%}
{{ bos_token }}
{%- set preamble -%}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}You are Command.{% endif -%}
{%- endset -%}
<|START|><|SYSTEM|>{{ preamble | trim }}<|END|>
{%- set sent = namespace(docs=false) -%}
{%- for message in messages %}
    {%- if message.role|lower == 'user' -%}
        <|START|><|USER|>{{ message.content }}<|END|>
        {%- if documents and not sent.docs -%}
            {{ document_turn(documents) }}{% set sent.docs = true %}
        {%- endif -%}
    {%- elif message.role|lower == 'assistant' or message.role|lower == 'chatbot' -%}
        <|START|><|CHATBOT|>
        {%- if message.tool_calls -%}
            {%- for tc in message.tool_calls -%}
{"id": {{ loop.index0 }}, "call": {{ tc.function.arguments|tojson(indent=4) }}, "o": {{ tc.function.arguments|dictsort }}}
            {%- endfor -%}
        {%- else -%}{{ message.content }}{%- endif -%}
        <|END|>
    {%- elif message.role == 'tool' -%}
        <|START|><|SYSTEM|>{{ {"result": message.content, "by": message.name | default("nobody")} | tojson }}<|END|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|START|><|CHATBOT|>{%- endif -%}
"""

_GRANITE = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Today is " ~ strftime_now("a day") ~ "." %}
    {%- if thinking %}{%- set system_message = system_message ~ " Think first." %}{%- endif %}
    {%- if controls and controls | length > 0 %}
        {%- set system_message = system_message + " " + controls | tojson %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|role|>system<|/role|>' + system_message + '<|text_end|>\\n' }}
{%- if documents %}
    {%- for document in documents %}
        {{- '<|role|>document {"id": "' ~ document.get('title', loop.index) ~ '"}<|/role|>' }}
        {{- document['text'] }}{{- '<|text_end|>\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|role|>' + message['role'] + '<|/role|>' }}
    {%- if message.tool_calls %}{{- '<|tool_call|>' + message.tool_calls|map(attribute='function')|list|tojson }}
    {%- endif %}
    {{- message.get('content', '') ~ '<|text_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|role|>assistant<|/role|>' }}{%- endif %}
"""

_GLM = """
[gMASK]<sop>
{%- macro visible_text(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}
            {%- elif item is string -%}{{- item }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>
{{ visible_text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- elif m.role == 'assistant' %}<|assistant|>
{%- set content = visible_text(m.content) %}
{%- if content.strip() %}{{ '\\n' + content.strip() }}{%- endif %}
{%- if m.tool_calls %}{% for tc in m.tool_calls %}
{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}
{% for k, v in _args.items() %}
<key>{{ k }}</key>
<value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</value>
{% endfor %}</tool_call>{% endfor %}{% endif %}
{%- elif m.role == 'tool' %}<|observation|>{{ '\\n' ~ visible_text(m.content) }}
{%- elif m.role == 'system' %}<|system|>
{{ visible_text(m.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{%- endif -%}
"""

_PARTS_ONLY = """
{%- for message in messages %}{{ message['role']|capitalize }}
{%- if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}
{%- for line in message['content'] %}
    {%- if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}
{%- endfor %}<end_of_utterance>
{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""

_PARTS_FOR_USERS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {{- "[INST]" }}
        {%- if message["content"] is not string %}
            {%- for chunk in message["content"] %}
                {%- if chunk["type"] == "image" %}{%- continue %}{%- endif %}
                {{- chunk["text"] }}
            {%- endfor %}
        {%- else %}
            {{- message["content"] }}
        {%- endif %}
        {{- "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}
        {%- set closed = message["content"] + eos_token %}
        {{- closed }}
        {%- endgeneration %}
    {%- elif message["role"] == "system" %}
        {{- "[SYSTEM]" + message["content"] + "[/SYSTEM]" }}
    {%- else %}
        {%- break %}
    {%- endif %}
{%- endfor %}
"""

_REASONING = """
{%- for message in messages %}
    {%- if message.role in ("developer", "system") %}
        {{- "<|start|>developer<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {%- if message.thinking %}{{- "<|start|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
        {{- "<|start|>assistant<|message|>" + (message.content or "") + ("<|end|>" if not loop.last else "") }}
    {%- else %}
        {{- "<|start|>" ~ message.role ~ (" " ~ message.name if message.name else "") ~ "<|message|>" }}
        {{- message.content ~ "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""

_FILTERS = """
{%- generation %}{% set inner = 'in' %}{{ inner }}{% endgeneration %}{{ inner | default('gone') }}
{%- set roles = messages | map(attribute='role') | list %}
{{ roles | join(',') }}|{{ roles | unique | sort | join('/') }}|{{ messages | rejectattr('role', 'eq', 'user') | list | length }}
{{ messages[0].content | upper | replace('A', 'b') | truncate(20) | e }}
{{ messages[0] | tojson(indent=2) }}
{{ messages[0].content | tojson(ensure_ascii=True) }} {{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':'), sort_keys=True) }}
{{ dict(a=1, b='ü') | tojson }} {{ range(3) | list }} {{ 7 // 2 }} {{ 'x' * 3 }} {{ [1, 2] + [3] }}
{% for message in messages if message.role == 'user' %}{{ loop.revindex }}{{ loop.cycle('odd', 'even') }}{% else %}none{% endfor %}
{%- filter trim %}  {{ bos_token ~ eos_token }}  {% endfilter %}
{%- if messages is sequence and messages[0] is mapping and none is none and 3 is odd %}yes{% endif %}
"""

TEMPLATES: dict[str, TemplateCase] = {
    "chatml": TemplateCase(_CHATML),
    "qwen": TemplateCase(_QWEN),
    "llama3": TemplateCase(_LLAMA3),
    "mistral": TemplateCase(_MISTRAL),
    "hermes": TemplateCase(_HERMES),
    "gemma": TemplateCase(_GEMMA, "both"),
    "phi": TemplateCase(_PHI),
    "deepseek": TemplateCase(_DEEPSEEK),
    "ernie": TemplateCase(_ERNIE),
    "command": TemplateCase(_COMMAND),
    "granite": TemplateCase(_GRANITE),
    "glm": TemplateCase(_GLM, "both"),
    "parts_only": TemplateCase(_PARTS_ONLY, "parts"),
    "parts_for_users": TemplateCase(_PARTS_FOR_USERS, "both_for_users"),
    "reasoning": TemplateCase(_REASONING),
    "filters": TemplateCase(_FILTERS),
}


def _says(role: str, content: object, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _call(name: str, arguments: object, call_id: str = "abc123xyz") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


_HI = _says("user", "Hi")
_SYSTEM = _says("system", "Be brief.")
_ASK = _says("user", "Weather in Zürich & <Bern>?")
_ARGUMENTS = '{"city": "Zürich", "days": [1, 2], "n": {"deep": null}}'
_RESULT = _says("tool", '{"sky": "blue"}', tool_call_id="abc123xyz", name="weather")
_CALLS = _says("assistant", None, tool_calls=[_call("weather", _ARGUMENTS)])
_OPEN = {"add_generation_prompt": False, "continue_final_message": True}
_CLOSED = {"add_generation_prompt": False}

CHATS: dict[str, Chat] = {
    "text": Chat([_HI]),
    "no_generation_prompt": Chat([_HI], _CLOSED),
    "system": Chat([_SYSTEM, _HI]),
    "turns": Chat([_SYSTEM, _HI, _says("assistant", " Hello! "), _says("user", "  more\n")]),
    "one_part": Chat([_says("user", _parts("Hi"))]),
    "parts": Chat([_says("user", _parts("one", " two ", "three"))]),
    "parts_everywhere": Chat(
        [
            _says("system", _parts("Be", "brief")),
            _says("user", _parts("a", "b")),
            _says("assistant", _parts("c", "d")),
            _HI,
        ]
    ),
    "empty_parts": Chat([_says("user", _parts("", "x"))]),
    "empty_text": Chat([_says("user", "")]),
    "markup": Chat([_says("user", '<b>&amp;</b> {{ x }} {% raw %} "q" \u2028 \U0001f600')]),
    "calls": Chat([_ASK, _CALLS, _RESULT]),
    "calls_with_objects": Chat(
        [_ASK, _says("assistant", None, tool_calls=[_call("weather", {"b": 1, "a": "ü"})]), _RESULT]
    ),
    "calls_without_content": Chat([_ASK, {"role": "assistant", "tool_calls": [_call("weather", "{}")]}, _RESULT]),
    "calls_with_content": Chat(
        [
            _ASK,
            _says("assistant", "I look.", tool_calls=[_call("weather", _ARGUMENTS)]),
            _RESULT,
            _says("user", "Thanks"),
        ]
    ),
    "two_calls": Chat(
        [
            _ASK,
            _says(
                "assistant",
                "",
                tool_calls=[_call("weather", _ARGUMENTS), _call("time", '{"zone": "CET"}', "def456uvw")],
            ),
            _RESULT,
            _says("tool", "noon", tool_call_id="def456uvw"),
            _says("assistant", "Blue at noon."),
            _HI,
        ]
    ),
    "parts_of_a_tool": Chat([_ASK, _CALLS, {**_RESULT, "content": _parts("blue", "sky")}]),
    "null_fields": Chat(
        [_says("user", "Hi", name=None, tool_calls=None), _says("assistant", "x", tool_calls=None), _HI]
    ),
    "thought_in_text": Chat([_HI, _says("assistant", "<think>\nhm\n</think>\n\nHello"), _says("user", "again")]),
    "reasoning": Chat([_HI, _says("assistant", "Hello", reasoning_content="hm")], _CLOSED),
    "reasoning_by_another_name": Chat([_HI, _says("assistant", "Hello", reasoning="hm"), _HI]),
    "thinking": Chat([_HI, _says("assistant", "Hello", thinking="hm"), _HI]),
    "continued": Chat([_HI, _says("assistant", "The answer is ")], _OPEN),
    "continued_thought": Chat([_HI, _says("assistant", "<think>\nhm\n</think>\n\nSo ")], _OPEN),
    "continued_from_nothing": Chat([_HI, _says("assistant", "")], _OPEN),
    "continued_parts": Chat([_HI, _says("assistant", _parts("The answer", " is "))], _OPEN),
    "roles_that_do_not_alternate": Chat([_HI, _HI]),
    "another_role": Chat([_HI, _says("critic", "No."), _HI]),
    "name": Chat([_says("user", "Hi", name="ann")]),
    "variables": Chat(
        [_HI],
        variables={
            "enable_thinking": False,
            "date_string": "1 May",
            "documents": [{"title": "a", "text": "über"}, {"text": "b"}],
            "controls": {"length": "short"},
        },
    ),
}
