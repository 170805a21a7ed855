"""What verifiable instructions ask of a response: one pure function each. ``instructions.CHECKS`` says which identifier is which."""

from __future__ import annotations

import json
import re

#: Where a sentence ends: a terminator with its closing marks, then white space; not after a title or "e.g.".
_SENTENCE_END = re.compile(
    r"""(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bProf\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<=[.!?])["”’')\]*]*\s+"""  # noqa: RUF001 - closing marks
)
#: Where NLTK's word_tokenize divides: white space, punctuation, before English contractions.
_WORD_BREAK = re.compile(
    r"""\s+|[;@#$%&?!()\[\]{}<>"“”«»]|--|\.\.\.|[:,](?!\d)|(?=n't\b)|(?='(?:s|m|d|ll|re|ve)\b)|(?<=\S)'(?=\s)""", re.IGNORECASE
)


def compare(count: int, relation: str, threshold: int) -> bool:
    """``count`` is "at least" or "less than" the threshold."""
    return count >= threshold if relation == "at least" else count < threshold


def keywords_existence(response: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, whatever its case, also inside a longer word."""
    return all(_occurrences(keyword, response) for keyword in keywords)


def keywords_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so often, also inside longer words."""
    return compare(_occurrences(keyword.strip(), response), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a word of its own."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter occurs so often, whatever its case."""
    return compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """So many words (stretches of letters, digits and underscores)."""
    return compare(len(re.findall(r"\w+", response)), relation, num_words)


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    return compare(count_sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs between ``***`` dividers; none of the inner ones empty."""
    paragraphs = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == num_paragraphs


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between blank lines, and the n-th (from 1, blank ones counted) begins with the word."""
    paragraphs = response.split("\n\n")
    filled = sum(bool(part.strip()) for part in paragraphs)
    if not 1 <= nth_paragraph <= filled or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and re.split(r"""[.,?!'"]""", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """The postscript's marker occurs, whatever its case; ``P.S.`` and ``P.P.S`` may have spaces inside."""
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(patterns.get(marker, re.escape(marker.lower())), response.lower()) is not None


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with one ``*`` or with ``-``."""
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    """One of IFEval's three answers occurs."""
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many ``*highlights*`` or ``**highlights**`` that are not empty; a double one counts as IFEval counts it."""
    single = [match.strip("*") for match in re.findall(r"\*[^\n\*]*\*", response)]
    double = [match[2:-2] for match in re.findall(r"\*\*[^\n\*]*\*\*", response)]
    return sum(bool(text.strip()) for text in single + double) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many section headings: the heading's word and a number."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole response is JSON, with or without a code fence around it."""
    text = re.sub(r"^```(?:json|Json|JSON)?", "", response.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title in double angular brackets that is not empty."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response))


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """The response begins with the request, whatever its case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(response: str) -> bool:
    """Two different responses, divided by six asterisks."""
    parts = [part.strip() for part in response.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def end_checker(response: str, *, end_phrase: str) -> bool:
    """The response ends with the phrase, whatever its case; double quotation marks around the response do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """The whole response stands in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words in capital letters only."""
    words = _WORD_BREAK.split(response)
    return compare(sum(word.isupper() for word in words if word), capital_relation, capital_frequency)


def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


def count_sentences(text: str) -> int:
    """Sentences of a text: stretches that end in ``.``, ``!`` or ``?`` before white space, and what is left at the end."""
    return sum(bool(sentence.strip()) for sentence in _SENTENCE_END.split(text))


def _occurrences(keyword: str, response: str) -> int:
    return len(re.findall(re.escape(keyword), response, re.IGNORECASE))
