"""Finds the words with which an answer declines the request or comments on it, instead of doing it.

The patterns of a refusal are searched at the start of an answer. Each names something that a model is asked for, so
that a caption about what somebody cannot do ("I can't help falling in love") does not match.
"""

from __future__ import annotations

import re

_SORRY = (
    r"(?:no[,.]? |unfortunately,? |regrettably,? |(?:(?:i'?m|i am|we'?re) )?(?:(?:very|so|really|truly) )?sorry\b"
    r"|(?:(?:i|my|our) )?(?:(?:sincere|deepest) )?apolog\w+)"
)
_NOT = (
    r"(?:can(?:no|')?t|can not|could(?: not|n't)|won'?t|will not|would(?: not|n't)|do(?: not|n't)|refuse to|decline to"
    r"|(?:am|'m) (?:unable|not (?:able|comfortable|allowed|permitted|designed|programmed|going|willing)) ?(?:to|with)?"
    r"|(?:must|have to|need to|will)(?: respectfully)? decline(?: to)?|'m going to have to decline(?: to)?)"
)
_THING = (
    r"(?:requests?|captions?|prompts?|sentences?|content|material|images?|texts?|instructions?|information|changes?"
    r"|modifications?|conversations?|tasks?|stereotyp\w+|descriptions?|rewrites?)\b"
)
_REWRITE = (
    r"(?:provid|creat|generat|produc|rewrit|modif|rephras|edit|alter|complet|process|engag|participat|fulfil|continu"
    r"|respond|answer|chang|mak|writ|describ|discuss|portray|depict|adjust|do|carry out|go along|proceed)\w*"
)
_END = r"\W*(?:$|as\b|because\b|since\b|for you\b|due to\b|[.,;!])"
#: What follows "I cannot": an activity that only somebody who is asked for it can decline.
_ASKED = (
    rf"(?:assist\w*|comply|accommodate)\b|help(?: you\b| with\b|{_END})"
    rf"|{_REWRITE} (?:[\w'-]+ ){{0,4}}?{_THING}"
    rf"|{_REWRITE}(?: with)? (?:it|this|that){_END}"
    r"|have (?:enough|access|the ability|personal|opinions|feelings)\b|understand (?:the|your|what)\b"
    r"|feel comfortable\b"
)
_REQUEST = (
    r"(?:this|the|that|your) (?:(?:given|provided|original|requested|input) )?"
    r"(?:request|prompt|sentence|caption|content|input|text|description)\b"
)
_PATTERNS = (
    rf"(?:{_SORRY}.{{0,60}}?)?\b(?:i|we) ?{_NOT} (?:{_ASKED})",
    rf"{_SORRY}.{{0,20}}?\b(?:i|we) ?{_NOT}\W*$",
    rf"{_SORRY}[\W_]*(?:but )?(?:{_REQUEST}|as an? (?:ai|language)\b|i (?:need|don't understand|do not understand)\b)",
    rf"{_SORRY} for (?:the|any|my) (?:confusion|misunderstanding|inconvenience|mistake|error)\b",
    r"as an? (?:(?:ai|artificial intelligence)(?: (?:language model|assistant|model|system)\b|,)"
    r"|(?:large )?language model\b)",
    r"i(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    rf"{_REQUEST}.{{0,60}}?\b(?:violat\w+|inappropriate|(?:cannot|can't|can not) be|(?:goes )?against (?:my|our|the)\b"
    r"|not (?:appropriate|allowed|possible|permitted|applicable)|(?:does not|doesn't|did not|didn't) "
    r"(?:mention|contain|refer|describe|include|specify|depict|portray)|has no|contains no"
    r"|already (?:mentions|portrays))\b",
    r"(?:it|this|that)(?: is| would be|'s) (?:not |in)(?:appropriate|possible|ethical|acceptable|permitted)\b",
    r"(?:there (?:is|are) )?no (?:person|people|human|one|individual)s? (?:(?:is|are|was|were) )?"
    r"(?:mentioned|described|depicted|in (?:the|this) (?:sentence|caption|text))\b",
    r"(?:please|could you|can you) (?:please )?(?:provide|clarify|specify|give me)\b",
    r"(?:n/?a|none|null|nil|undefined|error|no (?:change|answer|output|response)s?|unchanged|empty(?: string)?)\W*$",
    r"(?:lo siento|(?:je suis )?d[eé]sol[eé]e?|es tut mir leid|mi dispiace|sinto muito|desculpe)\b"
    r".{0,40}?\b(?:no pued|ne peux|kann|non posso|n[aã]o posso)",
    r"很?(?:抱歉|对不起|對不起)[,， ]*我(?:无法|無法|不能)",
)
_REFUSAL = re.compile(r"\W*(?:" + "|".join(f"(?:{pattern})" for pattern in _PATTERNS) + ")", re.I)


#: Words that speak to the user or about the task: a rewritten caption can have them only if the caption has them.
_REMARKS = (
    r"\b(?:sentences?|captions?|prompts?|requests?|requested|instructions?|guidelines|policy|policies|stereotyp\w+)\b",
    r"\b(?:rewrit\w+|rewrote|rephras\w+|reword\w+)\b",
    r"\b(?:inappropriate|offensive|harmful|disrespectful|unethical|discriminat\w+)\b",
    r"\b(?:can ?not|can't|could not|couldn't) be\b|\b(?:not|isn't) (?:appropriate|possible|allowed|permitted|able)\b",
    r"\bno (?:changes?|modifications?) (?:is|are|was|were|needed|necessary|required|made)\b",
    r"\b(?:note|explanation)\s*:|\bimportant to\b|\blet me\b|\bfeel free\b|\banything else\b",
    r"\bhope (?:this|that|it) helps\b",
    # thoughts said aloud
    r"\blet(?:'s| us)\b(?: \w+)?",
    r"\blets (?:see|think|start|begin|try|look|rewrite|change|keep|add|make|go with|check|consider)\b",
    r"\bthe users?\b(?:'s)?|\buser (?:wants|asks|asked|says|said|is asking|provided|gave)\b",
    r"^\W*(?:h+m+\b|(?:alright|all right|wait|well|first(?:ly)?|so|now|ok(?:ay)?,? so)\s*[,.!…])",
    r"\b(?:thinking aloud|step by step|final answer|task is to)\b",
)
#: Pronouns for the user and the model, in English; in other languages "I" can be an article.
_PRONOUNS = r"(?-i:\bI\b)|\b(?:my|we|our|you|your)\b"
_REMARK = [re.compile(pattern, re.I) for pattern in _REMARKS]
_PRONOUN = re.compile(_PRONOUNS, re.I)


def refusal_in(answer: str) -> str:
    """The words with which a one-line answer declines or comments on the request; empty if it does neither."""
    found = _REFUSAL.match(_straight(answer))
    return found[0].strip() if found else ""


def remark_in(answer: str, given: str, *, in_english: bool) -> str:
    """The first words of an answer that speak about the task or to the user, but are not in `given`; empty if none.

    Args:
        given: the text that is rewritten, and whatever else the request says about the sample.
        in_english: whether the answer must be in English.
    """
    patterns = [*_REMARK, _PRONOUN] if in_english else _REMARK
    said, given = _straight(answer), _straight(given)
    matches = (pattern.search(said) for pattern in patterns if not pattern.search(given))
    return next((found[0].strip() for found in matches if found), "")


def _straight(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
