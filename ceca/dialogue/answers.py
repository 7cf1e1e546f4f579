"""What counts of a model's text: thoughts go, refusals and empty words are recognised, characters made storable."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning(?:_content)?|reflection|analysis|scratchpad|cot)"
# Marks around thoughts, of common families of models.
_MARK = re.compile(
    rf"(?P<opening><{_NAME}\b[^<>/]*>|\[THINK\]|◁think▷|<\|(?:begin_of_thought|START_THINKING)\|>|"
    r"<\|channel\|>(?:analysis|commentary)|<\|channel>thought|<unused94>(?:thought)?)|"
    rf"</{_NAME}\s*>|<{_NAME}\s*/>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>|<\|channel\|>final|"
    r"<channel\|>|<unused95>",
    re.IGNORECASE,
)
# Marks around the answer itself: what they hold stays.
_ANSWER_MARK = re.compile(
    r"</?(?:answer|conclusion|s)>|<\|(?:(?:begin|end)_of_(?:box|solution)|(?:START|END)_RESPONSE|im_(?:start|end)|"
    r"return|end|message|start)\|>",
    re.IGNORECASE,
)
# What is left of the channels of gpt-oss where an endpoint drops their marks.
_CHANNELS = re.compile(r"^\s*analysis.*?assistant\s*final", re.IGNORECASE | re.DOTALL)


class Spoken(NamedTuple):
    """The answer in a model's text, and whether thoughts were removed."""

    text: str
    thought: bool


def spoken(text: str) -> Spoken:
    """Return the answer in a model's text, on one line.

    Thoughts are removed: between their marks, before a closing mark without an opening one, and after an opening mark
    without a closing one. Line breaks and repeated spaces become single spaces, and characters that UTF-8 cannot hold
    (half a surrogate pair) become U+FFFD.
    """
    text = _CHANNELS.sub("</think>", text)
    kept: list[str] = []
    thinks, end, thought = False, 0, False
    for mark in _MARK.finditer(text):
        if not mark["opening"] and not thinks:  # all before it was thought
            kept.clear()
        elif not thinks:
            kept.append(text[end : mark.start()])
        thinks, end, thought = bool(mark["opening"]), mark.end(), True
    if not thinks:
        kept.append(text[end:])
    return Spoken(one_line(_ANSWER_MARK.sub(" ", " ".join(kept))), thought)


def one_line(text: str) -> str:
    """Replace line breaks, control characters and repeated spaces by single spaces, and halves of characters by U+FFFD.

    The history and the table of dialogues hold texts in this form.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in whole).split())


# --- refusals ---------------------------------------------------------------------------------------------

_LOOKED_AT = 1000  # characters of an answer; a refusal comes first
_SORRY = (
    r"(?:(?:i'?m|i am|we'?re|we are) (?:\w+ )?(?:sorry|afraid)|sorry|(?:i|we) (?:\w+ )?apologi[sz]e|"
    r"(?:(?:my|our) (?:\w+ )?)?apologies|unfortunately|regrettably|i regret|as an? (?:\w+ )?(?:ai|language))\b"
)
_I = r"(?:(?:i|we|this (?:model|assistant|service))(?:'m| am|'re| are| is)?(?: \w+ly| just| also)?) "
_DECLINE = (
    r"(?:(?:(?:must|have to|need to|will have to) (?:\w+ly )?)?(?:decline|refuse)|not comfortable|"
    r"(?:do not|don't) feel comfortable|not (?:allowed|permitted|designed|in a position)|"
    r"(?:do not|don't) have (?:the (?:ability|capability)|access))"
)
_CANNOT = (
    r"(?:can'?t|can ?not|couldn't|could not|won't|will not|would rather not|unable|not able|not going|"
    r"(?:do not|don't) (?=provide|identify|describe|see any image))"
)
_TASK = (
    r"(?:help|assist|fulfil|comply|provide|describ|discuss|analy[sz]|process|view|access|engage|comment|continue|respond|"
    r"generate|summari[sz]|share|offer|identif|recogni[sz]e|do (?:that|this|so)|answer|support|complete|"
    r"(?:see|look at|interpret|open|read) (?:(?:the|this|any|your|an?) )?(?:image|picture|photo|content))"
)
_WHY = r"(?:(?:for|due to|because of|given) [^,]{0,40}, |(?:hmm|no|well|i must \w+ (?:you )?that),? )?"
_NO_PICTURE = (
    r"(?:there (?:is|was)|i (?:do not|don't|cannot|can't) (?:\w+ )?see)(?: an?| any| no| the)? "
    r"(?:image|picture|photo)s?"
    r"(?: (?:attached|provided|included|uploaded|shared|available|here|yet|in (?:your|this) \w+|to \w+))*\W*$"
)
_REFUSING = re.compile(
    rf"^{_WHY}(?:{_SORRY}.*?\b(?:{_I}(?:{_CANNOT}|{_DECLINE})\b|not something (?:i|we) )|"
    rf"{_I}{_DECLINE}\b|{_I}{_CANNOT}.{{0,40}}?\b{_TASK}|"
    r"(?:this|the|your) (?:image|request|content|picture|photo|prompt|question) (?:\w+ ){0,3}?"
    r"(?:violates?|goes against|blocked|rejected|flagged|refused|inappropriate)\b|"
    r"(?:it is|it would be|it's) (?:not appropriate|inappropriate|against|(?:not possible|impossible) for me)\b|"
    r"(?:i|we)(?: have been|'ve been| was| were| am| are|'m|'re) (?:instructed|programmed|told|trained) not to\b|"
    r"(?:i|we)'d rather not\b|(?:request|response|content) (?:was |is )?(?:blocked|rejected|denied|filtered)\b|"
    rf"{_NO_PICTURE}|"
    r"(?:that|this)(?:'s| is) not something (?:i|we) )"
)
_AFTER_SORRY = re.compile(rf"^(?:{_I}(?:{_CANNOT}|{_DECLINE})\b|no\W*$)")
_JUST_SORRY = re.compile(rf"^{_SORRY}\W*$")
# An apology, or "I cannot", at the start of a sentence. The questions are in English: an answer in another language
# that begins so describes nobody.
_ELSEWHERE = re.compile(
    r"^(?:lo siento|lo lamento|disculp[ae]|perd[oó]n|no puedo|desculpe|sinto muito|lamento|n[aã]o posso|"
    r"(?:je suis |nous sommes )?(?:vraiment |sinc[eè]rement )?d[ée]sol[ée]e?s?|je ne (?:peux|suis) pas|je m'excuse|"
    r"(?:es )?tut mir (?:sehr )?leid|entschuldig|leider (?:kann|darf)|ich kann (?:\w+ )?nicht|mi dispiace|spiacente|"
    r"non posso|het spijt me|ik kan (?:\w+ )?niet|helaas kan|tyvärr|jag kan inte|beklager|undskyld|przepraszam|"
    r"nie mog[ęe]|üzgünüm|maaf|xin lỗi|tôi không thể|извините|простите|к сожалению|я не могу|на жаль|вибачте|"
    r"抱歉|对不起|對不起|很抱歉|非常抱歉|很遗憾|我无法|我無法|我不能|无法|申し訳|すみません|ごめんなさい|恐れ入りますが|"
    r"omlouvám|je mi líto|sajnál|îmi pare rău|λυπάμαι|συγγνώμη|anteeksi|valitettavasti|žao mi je|vabandust|"
    r"죄송|미안|عذر|آسف|أعتذر|لا أستطيع|لا يمكنني|ขออภัย|ขอโทษ|क्षमा|माफ़|मुझे खेद|মাফ|দুঃখিত)"
)
_CLOTHES = re.compile(
    r"\b(?:wear(?:s|ing)|dressed|clad|jackets?|coats?|shirts?|t-shirts?|tops?|sweaters?|hoodies?|dress|skirts?|pants|"
    r"trousers|jeans|shorts|shoes|sneakers|boots|sandals|hats?|caps?|hair|backpacks?|handbags?|bags?|carr(?:ies|ying)|"
    r"holding|holds)\b"
)
_OFFERING = re.compile(
    r"^(?:if|please|let me|feel free|would you|you (?:can|could|may)|i can|i could|i'd be|i'm happy|i am happy|i would|"
    r"perhaps|maybe|is there|instead)\b"
)
_CLAUSES = re.compile(r"(?<=[.!?;:])\s+|[。！？；，]|,?\s+but\s+|,?\s*\bhowever\b,?\s*|\s+[-–—]\s+")


def refuses(text: str) -> bool:
    """Whether a text refuses to describe, and describes nobody all the same.

    A sentence that only says that something cannot be seen is no refusal, and a text that also describes is none.

    Args:
        text: an answer on one line, without thoughts.
    """
    plain = text[:_LOOKED_AT].lower().replace("’", "'")
    clauses = [clause.strip(" \t\"'*_#>«»“”„`()[],") for clause in _CLAUSES.split(plain) if clause]
    sorry = refusing = describing = False
    for clause in filter(None, clauses):
        if _REFUSING.search(clause) or (sorry and _AFTER_SORRY.search(clause)) or _ELSEWHERE.search(clause):
            refusing = True
        elif not _OFFERING.search(clause) and _CLOTHES.search(clause):
            describing = True
        sorry |= bool(_JUST_SORRY.search(clause))
    nothing_else = sorry and len(clauses) == 1
    return (refusing or nothing_else) and not describing


_LABEL = r"(?:the |a )?(?:short |final |brief )?(?:summary|description|answer|caption|output|response)"
_NOTHING = re.compile(
    rf"(?:{_LABEL}(?: is)?)?|(?:(?:{_LABEL}|(?:the |a )?person)(?: is)?\b)?\W*"
    r"(?:n[/. ]?a|nan|none|null|nil|nothing|undefined|unknown|unavailable|empty|error|tbd|unclear|"
    r"(?:is )?(?:not|un)[ -]?(?:applicable|available|known|specified|provided|visible|clear|sure|determined)|"
    r"no (?:summary|description|answer|caption|person|data|text|information|info|output|response|comment)"
    r"(?: (?:is |was )?(?:available|provided|given|visible|found|possible))?)",
    re.IGNORECASE,
)


def says_nothing(text: str) -> bool:
    """Whether a summary has no word that describes: "N/A", "None.", "Summary: unknown", "...", "{}".

    An answer may be such a word ("None." to what somebody carries); a summary may not.

    Args:
        text: a summary on one line, without thoughts.
    """
    return len(text) <= 80 and _NOTHING.fullmatch(re.sub(r"^\W+|\W+$", "", text)) is not None
