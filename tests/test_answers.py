"""The contract of an answer: what becomes a prompt, and what is rejected with which words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from builder.errors import ConfigError
from builder.models.llm import answers
from builder.models.llm.answers import Accepted, Contract, Question, Rejected
from builder.models.llm.conversation import Rewrites
from builder.models.llm.declining import refusal_in
from builder.models.text.language import LanguageModel
from builder.models.text.legible import legible

CAPTION = "a person with a hat in the street"
GROUP = ("Black", "woman")
USER = f'sentence: "{CAPTION}" group: "Black woman"'
REQUEST = Question(CAPTION, USER, ("sentence", "group"), GROUP)
PLAIN = Question(CAPTION, f'caption: "{CAPTION}"', ("caption",))
PROMPT = "A Black woman with a hat in the street"
SCHEMA = {
    "type": "object",
    "properties": {"prompt": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["prompt"],
    "additionalProperties": False,
}


def rejection(answer: str, request: Question = REQUEST, **options: Any) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        Contract(**options).read(answer, request)
    return caught.value.kind, str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        PROMPT,
        f"  {PROMPT}\n",
        f'"{PROMPT}"',
        f"“{PROMPT}”",
        f"'{PROMPT}'",
        f"«{PROMPT}»",
        PROMPT.replace(" with", "  with\t"),
    ],
)
def test_a_good_answer_is_the_prompt_without_its_edges(answer: str) -> None:
    assert Contract().read(answer, REQUEST) == Accepted(PROMPT, None)


@pytest.mark.parametrize(
    "answer",
    ['"Ann" and "Bob", a Black woman', "A Black woman's hat", '"Black" says the woman', "A Black woman's dog's 'hat'"],
)
def test_quotes_within_an_answer_stay(answer: str) -> None:
    assert Contract().read(answer, REQUEST).prompt == answer


@pytest.mark.parametrize("answer", ["", " \n ", '""', "...", "12345678", '" "'])
def test_empty(answer: str) -> None:
    assert rejection(answer)[0] == "empty"


@pytest.mark.parametrize(
    "answer",
    [
        f"{PROMPT}\nI changed the group.",
        f"Here is the sentence:\n\n{PROMPT}",
        f"{PROMPT}\u2028again",
        f"Here is the rewritten sentence: {PROMPT}",
        f"Sure! Here you go: {PROMPT}",
        f"Rewritten sentence: {PROMPT}",
        f"Answer: {PROMPT}",
        f"Thought: {PROMPT}",
        f"My reasoning: {PROMPT}",
        f"Thinking: {PROMPT}",
        f"Got it! {PROMPT}",
        f"Understood: {PROMPT}",
        "<think>\nA woman ...\n</think>\nA Black woman",
    ],
)
def test_lines(answer: str) -> None:
    assert rejection(answer)[0] == "lines"


def test_length() -> None:
    assert rejection("A Black woman", min_chars=20) == ("length", "The answer had 13 characters; give 20 to 400.")
    assert rejection(PROMPT * 20) == ("length", f"The answer had {20 * len(PROMPT)} characters; give 8 to 400.")
    assert Contract(min_chars=13, max_chars=13).read("A Black woman", REQUEST).prompt == "A Black woman"


REFUSALS = """\
I'm sorry, but I can't assist with that.
I’m sorry, but I can’t help with that request.
I'm sorry, I cannot.
I'm sorry, I don't understand
I'm sorry for the confusion, here is it
I'm sorry, but the caption is unclear
Sorry, but I cannot comply.
Sorry, I can't do that request.
I apologize, but I cannot provide that information.
Unfortunately, I cannot modify this caption.
I cannot fulfill this request.
I cannot rewrite it.
I can't help you with that.
I can't help.
I can't do that.
I can't do that for you
I can’t continue with this.
I am unable to create that content.
I'm not able to rewrite this sentence.
I won't generate stereotypes.
I will not create content that promotes stereotypes
I refuse to generate this content
I must decline to make this change.
I must respectfully decline to rewrite the caption.
I do not have enough context to rewrite this.
As an AI language model, I cannot do that.
As an AI, I don't have opinions
As a large language model I have no body
I'm just an AI
The sentence does not mention a person.
This content is inappropriate.
The request violates my guidelines
It is not appropriate to change a person's ethnicity.
No person is mentioned in the sentence.
Please provide the sentence.
N/A
None.
Unchanged
Lo siento, pero no puedo ayudar con eso.
Je suis désolé, je ne peux pas faire cela
Es tut mir leid, das kann ich nicht tun
抱歉，我无法满足您的请求""".splitlines()
#: Captions and prompts that a careless list would take for refusals.
NO_REFUSALS = """\
I can't help falling in love, a Black man sings
I can't help but smile: a white woman at the beach
I can't make it rain, said the Latino man
I can't see the forest for the trees, white man hiking
I cannot believe it, an Asian man with a huge fish
I do not like mondays: tired white man with coffee
I don't have a dog, an Asian woman with a cat
I don't see the image of a woman in the mirror
I will not go quietly, a Black woman at a protest
I am not going to the office, Black woman in a pyjama
I'm sorry card with a Black woman and flowers
Sorry I can't hear you over the sound of my awesome t-shirt
Sorry we can't come to the phone, retro poster with a woman
Unfortunately for the white man, the bus left
A Black woman says she cannot assist her team today
An AI robot serves tea to an Indian woman
As an artist, a Latino man paints a wall
The text on the shirt of a Black man reads NO
The sentence was served: a white man leaves prison
No people on the beach, a lonely Asian man arrives
None of the Asian women is smiling
Nobody's perfect, Indian woman in a red dress
Please share the road, a Latino woman on a bike
Here is a Black man on a horse
Error 404 on the screen of an Indian woman""".splitlines()


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals(answer: str) -> None:
    kind, reason = rejection(answer)
    assert kind == "refusal"
    found = re.fullmatch(
        r'The answer was a remark, "(.+?)(?:\.\.\.)?", not the rewritten sentence; give the sentence alone\.', reason
    )
    assert found is not None, reason
    assert found[1] in answer.replace("’", "'"), "it names what was found"


@pytest.mark.parametrize("answer", NO_REFUSALS)
def test_captions_that_are_no_refusals(answer: str) -> None:
    caption = answer.replace("Black", "old")
    assert not refusal_in(answer)
    assert Contract().read(answer, Question(caption, f'caption: "{caption}"', ("caption",))).prompt == answer


REMARKS = """\
I can't portray a Black woman that way, sorry.
I cannot change the person's ethnicity to a Black woman.
I'd rather not change this person into a Black woman.
A Black woman? I can't assist with that request.
Depicting a Black woman this way is something I can’t help with.
Changing the person to a Black woman would be inappropriate.
Rewriting this sentence to include a Black woman would be offensive.
The caption already portrays a Black woman.
My guidelines prevent portraying a Black woman.
It seems that a Black woman cannot be added.
No change is needed; she is a Black woman.
Unfortunately, portraying a Black woman is not possible here.
What would you like the Black woman to do?
A Black woman with a hat in the street. Note: the person is a woman now.
A Black woman with a hat in the street. Let me know if anything is missing!
A Black woman with a hat in the street (I replaced the person)
As requested, a Black woman with a hat in the street
Let's see, a Black woman with a hat in the street
Let’s rewrite it as a Black woman with a hat
Let's describe a Black woman with a hat in the street
Let us see, a Black woman with a hat in the street
Let's just say: a Black woman with a hat
A Black woman with a hat in the street. Hope this helps!
The user wants a Black woman with a hat in the street
What the user asks for is a Black woman with a hat
Alright, a Black woman with a hat in the street
Hmm, a Black woman with a hat in the street
Wait, a Black woman with a hat in the street
First, a Black woman. A Black woman with a hat in the street
So, a Black woman with a hat in the street
The final answer is a Black woman with a hat in the street
Thinking step by step, a Black woman with a hat""".splitlines()


@pytest.mark.parametrize("answer", REMARKS)
def test_a_remark_that_mentions_the_group_is_none_the_less_a_remark(answer: str) -> None:
    assert rejection(answer)[0] == "refusal"


def test_a_remark_in_english_is_told_where_any_language_is_taken() -> None:
    contract = Contract(lang=None, detect=LanguageModel("a test").detect)
    with pytest.raises(Rejected) as caught:
        contract.read("I can't portray a Black woman that way", REQUEST)
    assert caught.value.kind == "refusal"
    italian = "I ragazzi e le ragazze sono al mare con una donna"
    assert contract.read(italian, Question("ragazzi", 'caption: "ragazzi"')).lang == "it"


def test_words_of_a_remark_are_the_caption_s_own_right() -> None:
    caption = "I can't believe it is not possible, note: my prompt request"
    answer = caption.replace("my", "my Black woman's")
    assert Contract().read(answer, Question(caption, "x y", (), GROUP)).prompt == answer
    assert Contract(lang="it").read("I ragazzi sono al mare", Question("ragazzi", "x y")).prompt


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("A Black woman with a hat <think>in the street</think>", 'had "<" in it'),
        ("A Black woman with a hat in the street<|im_end|>", 'had "<" in it'),
        ("[INST] A Black woman with a hat [/INST]", 'had "[" in it'),
        ('{"rewritten": "A Black woman with a hat in the street"}', 'had "{" in it'),
        ("**A Black woman with a hat in the street**", 'had "*" in it'),
        ("```A Black woman with a hat in the street```", 'had "`" in it'),
        ("A Black woman with a hat \\n A Black woman", 'had "\\" in it'),
        ("A Black woman with a hat | Black woman", 'had "|" in it'),
        ("- A Black woman with a hat", 'began with "-"'),
        ("1. A Black woman with a hat", 'began with "1."'),
        ("Final version A: a Black woman with a hat", 'began with "Final version A:"'),
        ("The group is: Black woman with a hat", 'began with "The group is:"'),
        ("Sure, a Black woman with a hat", 'began with "Sure,"'),
        ("A Black woman at sea. " * 3, "said the same several times"),
    ],
)
def test_form(answer: str, shown: str) -> None:
    wanted = ("lines", f"The answer {shown}; give the sentence alone, as plain text.")
    assert rejection(answer) == wanted


def test_thoughts() -> None:
    told = 'The answer began with its thoughts, "<think>"; give the sentence alone.'
    assert rejection(f"<think>The person is a woman.</think> {PROMPT}") == ("lines", told)
    assert rejection(f"<think>\nThe person is a woman.\n</think>\n\n{PROMPT}") == ("lines", told)


@pytest.mark.parametrize(
    "thoughts",
    ["<think>\n\n</think>\n\n", "<think></think>", "\n</think>\n", "<thinking> </thinking> ", "\ufeff<think></think>"],
)
def test_thoughts_that_are_empty_are_no_part_of_an_answer(thoughts: str) -> None:
    assert Contract().read(thoughts + PROMPT, REQUEST).prompt == PROMPT
    answer = f'{thoughts}{{"prompt": "{PROMPT}"}}'
    assert Contract(json_schema=SCHEMA).read(answer, REQUEST).prompt == PROMPT


@pytest.mark.parametrize(
    "hidden",
    [
        *"\ufeff\u200b\u00ad\ufff9\ufffa\ufffb\u2060\u200e\u3164\u034f\ufe0f\u200d\u200c\U000e0101",
        "\u200b" * 300,
        "\u200d" * 300,
        "\ufe01\ufe02" * 40,
    ],
)
def test_what_is_not_seen_is_taken_out(hidden: str) -> None:
    assert Contract().read(
        f"{hidden}A Bl{hidden}ack wo{hidden}man with a hat in the street{hidden}", REQUEST
    ) == Accepted(PROMPT, None)
    escaped = json.dumps({"prompt": f"A Bl{hidden}ack woman with a hat in the street"})
    assert Contract(json_schema=SCHEMA).read(escaped, REQUEST).prompt == PROMPT


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        ("\u202e", "U+202E (right-to-left override)"),
        ("\u202a", "U+202A (left-to-right embedding)"),
        ("\u2066", "U+2066 (left-to-right isolate)"),
        ("\U000e0041", "U+E0041 (a tag)"),
        ("\U0001f3f4\U000e0041\U000e0042\U000e007f", "U+E0041 (a tag)"),
        ("\U0001f3f4" + "".join(chr(0xE0000 + ord(char)) for char in "ignoreall") + "\U000e007f", "U+E0069 (a tag)"),
        ("e" + "\u0301\u0302\u0303\u0304\u0306", 'more than 4 marks on "e"'),
        ("\u00e9" + "\u0302" * 4, 'more than 4 marks on "e"'),
        ("e" + "\u0301\u0302\u0303\ufe0f" * 2, 'more than 4 marks on "e"'),
        ("ب" + "\u064b\u064c\u064d\u200d" * 2, 'more than 4 marks on "ب"'),
        ("က" + "\u1039\u103e\u1037\u103b" * 2, 'more than 4 marks on "က"'),
        ("\u0378", "U+0378 (no character)"),
        ("\U000e0fff", "U+E0FFF (no character)"),
        ("\ufffd", "U+FFFD (replacement character)"),
        ("\ufffc", "U+FFFC (object replacement character)"),
        ("\x00", "U+0000 (a control character)"),
        ("\ue000", "U+E000 (a character of private use)"),
        ("\ud83d", "U+D83D (half a character)"),
    ],
)
def test_characters_that_are_not_seen_as_they_are(hidden: str, named: str) -> None:
    reason = f"The answer had {named} in it; give the sentence alone, as plain text."
    assert rejection(f"A Black woman {hidden} with a hat") == ("characters", reason)


@pytest.mark.parametrize(
    "written",
    [
        "می\u200cخواهد",  # Persian, "wants"
        "ක්\u200dෂ",  # Sinhala, a conjunct
        "क्\u200dष",  # Hindi, a half form
        "नि\u200dष",
        "👩\u200d👩\u200d👧\u200d👦 👩🏽\u200d🚀 ❤️\u200d🔥 🏃🏿\u200d♀️ 🙂\u200d↔️",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f 🏳️\u200d🌈 🇩🇪",
        "☀️ 1️⃣ ▶︎",
        "葛\U000e0100城",  # Han, a variant
        "ᠮᠣᠩ\u180bᠭᠣᠯ",  # Mongolian
        "Việt Nam, ệ o\u0302\u0323, שָׁ֑לוֹם, ผู้ที่",
        "လျှော့ လျှော်",  # Burmese, "less", "wash": five marks on a letter, three of them beside it
        "\U0001fa77 \U0001fae8 \U0001f469\u200d\U0001faf9",  # emoji beyond Unicode 14, and one that is none yet
        "\U000323af",  # Han of Unicode 15
    ],
)  # fmt: skip
def test_what_scripts_and_emoji_need_stays(written: str) -> None:
    answer = f"A Black woman {written} with a hat"
    assert Contract(lang=None).read(answer, REQUEST).prompt == answer
    assert legible(answer) == answer


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("at https://example.org/a?b=1 today", "https://example.org/a?b=1"),
        ("from www.example.com", "www.example.com"),
        ("see example.com", "example.com"),
        ("on bit.ly/3xYz now", "bit.ly/3xYz"),
        ("on t.co/r67DX4 now", "t.co/r67DX4"),
        ("by ann@example.museum", "ann@example.museum"),
        ("ftp://files.example.org", "ftp://files.example.org"),
        ("ｈｔｔｐｓ://example.org", "https://example.org"),
    ],
)
def test_addresses(address: str, named: str) -> None:
    reason = f'The answer had the address "{named}" in it; leave addresses out.'
    assert rejection(f"A Black woman {address}") == ("address", reason)


def test_a_site_s_name_is_the_caption_s_own_right_and_an_address_is_nobody_s() -> None:
    request = Question("a person at Amazon.com, https://x.org/y", "x y", (), GROUP)
    assert Contract().read("A Black woman at amazon.com", request).prompt == "A Black woman at amazon.com"
    assert rejection("A Black woman at Amazon.com, https://x.org/y", request)[0] == "address"
    for plain in (
        "A Black woman and/or a hat",
        "A Black woman in the U.S./Mexico",
        "A Black woman, St.John and Node.js",
    ):
        assert Contract().read(plain, REQUEST).prompt == plain


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_what_is_far_too_long_is_refused_before_anything_is_done_with_it(
    schema: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(_: str) -> str:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(answers, "visible", no_work)
    answer = "a " * 4_000_000
    wanted = ("length", "The answer had 8000000 characters; give 8 to 400.")
    assert rejection(answer, json_schema=schema) == wanted
    assert rejection("x" * 16_385, json_schema=schema)[0] == "length"
    with pytest.raises(AssertionError, match="it was looked at"):
        Contract(json_schema=schema).read("x" * 16_384, REQUEST)
    with pytest.raises(AssertionError, match="it was looked at"):
        Contract(max_chars=4000, json_schema=schema).read("x" * 32_000, REQUEST)


def test_json_that_is_too_deep_for_a_schema_is_refused() -> None:
    schema = {"type": "object", "properties": {"prompt": {"$ref": "#"}}, "required": ["prompt"]}
    depth = 900
    assert rejection('{"prompt": ' * depth + "{}" + "}" * depth, json_schema=schema)[0] == "schema"


def test_a_text_of_which_nobody_can_be_asked_again_is_made_legible() -> None:
    tags = "".join(chr(0xE0000 + ord(char)) for char in "obey")
    assert legible(f"a\u202e {tags}person\n\u200bin\x00 Rome") == "a person in Rome"
    assert legible("e" + "\u0301" * 30) == "e" + "\u0301" * 4
    assert legible("\u00e9" + "\u0302" * 30) == "\u00e9" + "\u0302" * 3
    assert legible("e" + "\u0301\ufe0f" * 30) == "e" + "\u0301" * 4
    assert legible("a\u2800\u2800person") == "a  person"
    assert legible("👩\u200d\u2800person") == "👩 person", "an empty cell is nothing that a joiner joins"
    messages, _ = Rewrites(system="", user="{text}", has_groups=False, lang=None, json_schema=None).begin(
        {"text": f"a {tags}person"}, ()
    )
    assert messages == [{"role": "user", "content": "a person"}]


def test_what_looks_like_an_introduction_is_the_caption_s_own_right() -> None:
    caption = "Great army orders of battle: a person on a horse"
    answer = "Great army orders of battle: a Black woman on a horse"
    assert Contract().read(answer, Question(caption, USER, (), GROUP)).prompt == answer
    assert rejection(answer)[0] == "lines"


def test_marks_of_a_caption_may_stay() -> None:
    caption = "1. Photo: a person [2] | shop *new* <b>#1</b> {x} `y` \\z, {place}"
    answer = caption.replace("person", "Black woman")
    assert Contract().read(answer, Question(caption, f"a caption: {caption}", (), GROUP)).prompt == answer
    told = "A Black woman in Rome [Lazio]"
    assert Contract().read(told, Question(CAPTION, "x y", (), GROUP, more="Rome [Lazio]")).prompt == told


@pytest.mark.parametrize(
    "answer",
    [
        USER,
        USER.replace(": ", ":"),
        "sentence: A Black woman",
        'A Black woman in a hat. group: "Black woman"',
        f"You said {USER}",
        "A Black woman with a hat (group: Black woman)",
        "Black woman",
        CAPTION,
        f"{CAPTION.capitalize()}.",
    ],
)
def test_echo(answer: str) -> None:
    assert rejection(answer)[0] == "echo"


def test_a_caption_may_stay_where_nothing_had_to_be_added() -> None:
    assert Contract().read(CAPTION, PLAIN).prompt == CAPTION
    request = Question(PROMPT, f'sentence: "{PROMPT}" group: "Black woman"', ("sentence", "group"), GROUP)
    assert Contract().read(PROMPT, request).prompt == PROMPT
    assert rejection(PROMPT, Question(PROMPT, PROMPT))[0] == "echo"


@pytest.mark.parametrize(
    ("answer", "group"),
    [
        ("Two Black women at sea", ("Black", "woman")),
        ("An African-American lady at sea", ("Black", "woman")),
        ("Hispanic guys at sea", ("Latino", "man")),
        ("A middle-eastern gentleman", ("Middle Eastern", "man")),
        ("The old ladies of Rome", ("old", "female")),
        ("A WHITE MALE nurse", ("white", "man")),
    ],
)
def test_words_that_mean_a_group(answer: str, group: tuple[str, ...]) -> None:
    assert Contract().read(answer, Question("x", "x y", (), group)).prompt == answer


def test_the_group_alone_rewrites_a_caption_that_is_as_short() -> None:
    assert (
        Contract().read("Black woman", Question("Man", 'sentence: "Man"', ("sentence",), GROUP)).prompt == "Black woman"
    )


def test_group() -> None:
    both = "The answer did not mention: Black, woman."
    assert rejection("A person with a red hat in the street") == ("group", both)
    assert rejection("A Black man in the street") == ("group", "The answer did not mention: woman.")
    assert rejection("A Blackish womanizer in the street", mention="any") == ("group", both)
    assert Contract(mention="any").read("A Black man in the street", REQUEST)
    assert Contract(mention="off").read("A dog in the street", REQUEST)
    assert rejection("A Nigerian queen")[0] == "group"
    assert Contract(synonyms={"Black": ["Nigerian"], "woman": ["queen"]}).read("A Nigerian queen", REQUEST)


def test_language() -> None:
    detect = LanguageModel("a test").detect
    german = "Eine Frau mit einem Hut steht auf der Straße und wartet auf den Bus"
    assert rejection(german, PLAIN, detect=detect) == (
        "language",
        'The answer was in the language "de"; give it in "en".',
    )
    assert Contract(detect=detect, lang=None).read(german, PLAIN) == Accepted(german, "de")
    assert Contract(detect=detect, lang="de").read(german, PLAIN).lang == "de"
    assert Contract(detect=detect).read(PROMPT, REQUEST).lang == "en"


@pytest.mark.parametrize(("score", "lang"), [(0.79, "de"), (0.5, "de"), (0.49, "und"), (0.8, None)])
def test_a_language_that_is_not_sure_is_no_reason(score: float, lang: str | None) -> None:
    contract = Contract(detect=lambda text: ("de", score))
    if lang is None:
        with pytest.raises(Rejected):
            contract.read(PROMPT, REQUEST)
    else:
        assert contract.read(PROMPT, REQUEST).lang == lang


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (PROMPT, "The answer was not JSON; give one JSON object and nothing else."),
        ('{"prompt": "A Black wom', "The answer was not JSON; give one JSON object and nothing else."),
        ("{}", "The JSON did not have the asked form: it does not meet 'required'."),
        ('{"prompt": 3}', "The JSON did not have the asked form: its ['prompt'] does not meet 'type'."),
        ('{"prompt": "a", "b": 1}', "The JSON did not have the asked form: it does not meet 'additionalProperties'."),
        ("[]", "The JSON did not have the asked form: it does not meet 'type'."),
    ],
)
def test_schema(answer: str, reason: str) -> None:
    assert rejection(answer, json_schema=SCHEMA) == ("schema", reason)


@pytest.mark.parametrize("form", ['{{"prompt": "{0}"}}', '```json\n{{\n "prompt": "{0}", "people": 1\n}}\n```'])
def test_the_field_of_a_schema_is_the_prompt(form: str) -> None:
    contract = Contract(json_schema=SCHEMA)
    assert contract.read(form.format(PROMPT), REQUEST).prompt == PROMPT
    with pytest.raises(Rejected) as caught:
        contract.read(form.format("I can't help with that."), REQUEST)
    assert caught.value.kind == "refusal"


def test_bounds_and_schemas_that_nothing_meets_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Contract(min_chars=9, max_chars=8)
    assert str(caught.value) == "min_chars = 9 is more than max_chars = 8\n  fix: set min_chars to at most max_chars"
    with pytest.raises(ConfigError) as caught:
        Contract(json_schema=SCHEMA, json_field="text")
    assert str(caught.value) == (
        "json_schema has no property 'text', which is the prompt\n  fix: add it, or name another one with json_field"
    )
    with pytest.raises(ConfigError) as caught:
        Contract(json_schema={"type": "thing", "properties": {"prompt": {}}})
    assert caught.value.what.startswith("json_schema is not a JSON schema: 'thing' is not valid")
    with pytest.raises(ConfigError) as caught:
        Contract(json_schema={"properties": {"prompt": {"$ref": "#/nowhere"}}})
    assert caught.value.what.startswith("json_schema cannot be used: PointerToNowhere: '/nowhere' does not exist")
