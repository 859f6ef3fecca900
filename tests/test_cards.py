"Model cards: every shipped network says what it was trained on, how long, how good it is, and under which licence it and its published relatives stand."
import re

import pytest

from camflow.assets import _home, licence_note

TINY = _home("tiny")
WEIGHTS = sorted(TINY.rglob("*.safetensors"))
CARDS = sorted(TINY.rglob("card.md"))
HEADINGS = ("Data", "Training", "Held-out numbers", "Licence", "Published weights of this architecture")
LICENCES = r"Apache-2\.0|CC BY-NC 4\.0|MIT|OpenRAIL|Open RAIL-M|Community licence|not known here|no licence"


def sections(text: str) -> dict: # heading: what stands below it
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2])))


def card_id(card): return str(card.parent.relative_to(TINY))


def complaints(text: str) -> list:
    "What a card lacks."
    found = sections(text)
    wrong = [f"no section {name!r}" for name in HEADINGS if not found.get(name)]
    if wrong: return wrong
    if not re.search(r"\d", found["Held-out numbers"]): wrong.append("no number on held-out data")
    if not re.search(r"\d[\d ]* ?steps|\d+ of \d+ steps", found["Training"]): wrong.append("no number of steps")
    if not re.search(r"\d+(\.\d+)? (s|seconds|minutes|hours?) of|hours? of|CPU minutes|CPU hours|time: not", found["Training"]): wrong.append("no time, and not said to be unknown")
    if not re.search(LICENCES, found["Licence"]): wrong.append("no licence of the weights")
    if not re.search(LICENCES, found["Published weights of this architecture"]): wrong.append("no licence of the published weights")
    if "camflow weights" not in found["Published weights of this architecture"]: wrong.append("does not say where `camflow weights` lists them")
    return wrong


def test_all_weights_have_a_card():
    assert len(CARDS) >= 8
    for file in WEIGHTS: assert any(card.parent in file.parents for card in CARDS), f"{file} has no card.md in its folder or above"


@pytest.mark.parametrize("card", CARDS, ids=card_id)
def test_card_is_complete(card):
    assert not complaints(card.read_text(encoding="utf-8"))


@pytest.mark.parametrize("card", CARDS, ids=card_id)
def test_its_commands_list_something(card):
    from camflow.lab.published import chosen
    for words in re.findall(r"`camflow weights ([^`]+)`", card.read_text(encoding="utf-8")): assert chosen(words.split())


def test_a_bare_card_is_refused():
    text = CARDS[0].read_text(encoding="utf-8")
    for name in HEADINGS: assert complaints(text.replace(f"## {name}\n", "## Other\n")) == [f"no section {name!r}"]
    good = "# x\n\n## Data\n\nworld\n\n## Training\n\n- 30 steps, 5 minutes of one core\n\n## Held-out numbers\n\n1 dB\n\n## Licence\n\nMIT\n\n## Published weights of this architecture\n\nMIT, `camflow weights x`\n"
    assert not complaints(good)
    for was, now in (("30 steps, ", ""), ("5 minutes of one core", ""), ("1 dB", "good"), ("Licence\n\nMIT", "Licence\n\nfree"), ("architecture\n\nMIT", "architecture\n\nfree")): assert len(complaints(good.replace(was, now))) == 1


def test_written_cards_have_the_same_sections():
    "What the trainings write when they export."
    from camflow.depth.pose import PoseNet, card
    from camflow.flow import train as flow
    from camflow.stereo import train as stereo
    from camflow.wan import finetune, omnicam_train, vae_train
    for text in (flow.CARD, stereo.CARD, finetune.CARD, omnicam_train.CARD, vae_train.CARD, card(PoseNet(32, 2), "30 steps", None, licence_note())): assert tuple(sections(text)) == HEADINGS


def test_licence_of_what_went_in():
    assert licence_note(start=None, data="world", vae="tiny") == "Apache-2.0; no outside data or weights"
    assert "weights/wan" in licence_note(transformer="weights/wan") and "Apache" not in licence_note(root="MultiCamVideo-Dataset")


def test_numbers_are_written_again_and_other_lines_stay():
    from camflow.files import read_json
    from camflow.wan.omnicam_evaluate import _with_scripts
    text, found = (TINY/"omnicam/card.md").read_text(encoding="utf-8"), read_json(TINY/"omnicam/scores.json")["scripts"]
    assert _with_scripts(text, found) == text
    by_hand = text.replace("\n\n## Licence", "\n- a line by hand\n\nAnother.\n\n## Licence")
    other = _with_scripts(by_hand, {**found, "rotation_ratio": 0.9})
    assert "0.90 of its rotation error" in other and other.endswith(by_hand[by_hand.index("\n- a line by hand"):]) and other.count("held-out scripts") == text.count("held-out scripts")
