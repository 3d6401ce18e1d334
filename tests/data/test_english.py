"""Numbers, prices and titles in words: against inflect, against transformers, and by hand."""

import pytest

from ldm_audio.data.english import cardinal, clean_basic, clean_english, ordinal, split_text
from ldm_audio.errors import InputError


@pytest.fixture(scope="module")
def engine():
    import inflect

    return inflect.engine()


def by_inflect(engine, number: int) -> str:
    """How the original asks inflect."""
    if not 1000 < number < 3000:
        return engine.number_to_words(number, andword="")
    if number == 2000:
        return "two thousand"
    if 2000 < number < 2010:
        return "two thousand " + engine.number_to_words(number % 100)
    if number % 100 == 0:
        return engine.number_to_words(number // 100) + " hundred"
    return engine.number_to_words(number, andword="", zero="oh", group=2).replace(", ", " ")


LARGE = (123456, 10**6, 10**6 + 5, 10**9 + 99, 10**9 + 100, 123456789012345678, 10**36 - 1)


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_numbers_up_to_20000_are_inflects(engine, step):
    for number in (*range(3100), *range(3100, 20001, step), *LARGE):
        assert cardinal(str(number), "original") == by_inflect(engine, number), number


def test_ordinals_up_to_5000_are_inflects(engine):
    for number in (*range(5001), *LARGE):
        assert ordinal(str(number), "original") == engine.number_to_words(f"{number}th"), number


def test_the_other_style_is_that_of_transformers():
    from transformers.models.clvp.number_normalizer import EnglishNormalizer

    peer = EnglishNormalizer()
    texts = [str(number) for number in (*range(3200), 123456, 10**17 + 3, 10**18)]
    texts += [f"{number}th" for number in range(1250)]
    texts += [text for text, *_ in BY_HAND] + ["café — “naïve” £5", "$3.05 $1.2.3 3.14"]
    for text in texts:
        assert clean_english(text, "transformers") == peer(text), text


BY_HAND = [
    ("Hello World", "hello world"),
    (" two  spaces\n", " two spaces "),  # neither end is stripped
    ('He said "no".', "he said no."),
    ("0 7 10 19 21 100 101 999", "zero seven ten nineteen twenty-one one hundred one hundred one "
     "nine hundred ninety-nine"),
    ("1000 1001 1066 1900 1905 1984", "one thousand ten oh one ten sixty-six nineteen hundred "
     "nineteen oh five nineteen eighty-four"),
    ("2000 2001 2010 2999 3000", "two thousand two thousand one twenty ten twenty-nine ninety-nine "
     "three thousand"),
    ("3,005 3,105 12,345,678", "three thousand five three thousand, one hundred five twelve million, "
     "three hundred forty-five thousand, six hundred seventy-eight"),
    ("007", "seven"),
    ("1st 2nd 3rd 4th 5th 8th 9th 12th 20th 21st 101st", "first second third fourth fifth eighth ninth "
     "twelfth twentieth twenty-first one hundred and first"),
    ("1984th", "one thousand, nine hundred and eighty-fourth"),
    ("$1 $2 $1.01 $0.50 $.5 $0 $3.05", "one dollar two dollars one dollar, one cent fifty cents five cents "
     "zero dollars three dollars, five cents"),
    ("$3.5", "three dollars, five cents"),
    ("$1.2.3", "one point two.three dollars"),
    ("$2,500", "twenty-five hundred dollars"),
    ("3.14 0.5", "three point fourteen zero point five"),
    ("£20", "pstwenty"),  # a quirk of the original
    ("Mr. and Mrs. Smith, Dr. No, St. Ives", "mister and misess smith, doctor no, saint ives"),
    ("Co. Jr. Maj. Gen. Drs. Rev. Lt. Hon.", "company junior major general doctors reverend lieutenant "
     "honorable"),
    ("Sgt. Capt. Esq. Ltd. Col. Ft.", "sergeant captain esquire limited colonel fort"),
    ("alcohol. costs", "alcohol. costs"),  # "col." and "co" only as words of their own
    ("Café — naïve “quoted” it’s… Łódź ½", "cafe -- naive quoted it's... lodz one/two"),
    ("привет", "привет"),  # no ASCII form is known: the tokenizer will not know it either
]  # fmt: skip


@pytest.mark.parametrize("text, expected", BY_HAND)
def test_texts_written_out_by_hand(text, expected):
    assert clean_english(text) == expected


def test_numbers_beyond_36_digits_are_read_digit_by_digit():
    assert cardinal("1" + "0" * 36, "original") == " ".join(["one"] + ["zero"] * 36)


def test_basic_cleaning_lowers_and_collapses():
    assert clean_basic("Grüße  AUS\n1984") == "grüße aus 1984"
    with pytest.raises(InputError, match="style='other'"):
        clean_english("a", "other")


def test_long_texts_are_cut_behind_sentences():
    sentence = "This sentence has exactly fifty characters in it.. "
    pieces = split_text(sentence * 20)
    assert [len(piece) for piece in pieces] == [203, 203, 203, 203, 203]
    assert " ".join(pieces) == (sentence * 20).strip()
    assert split_text("Short. Text.") == ["Short. Text."]


def test_texts_are_cut_where_the_user_says():
    assert split_text("one. two| three |!| four") == ["one. two", "three", "four"]


def test_a_sentence_does_not_end_within_quotes_or_numbers():
    text = '"Stop! Go! ' + "word " * 45 + 'end." Then 3.5 more ' + "word " * 20
    first, second = split_text(text)
    assert first.endswith('end."') and second.startswith("Then 3.5")


def test_what_has_no_end_is_cut_between_words_and_nothing_is_lost():
    for text in ("word " * 200, "x" * 1000, "a. " + "y" * 700):
        pieces = split_text(text)
        assert all(0 < len(piece) <= 300 for piece in pieces)
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert split_text("...") == [] and split_text("") == []
