"""What a user would type for each motion, in English and in Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Literal

from training import phrases as tables
from training.phrases import PHRASES, SCENES, split

__all__ = ["NEUTRAL", "PHRASES", "caption", "neutral"]

Language = Literal["en", "zh"]

NEUTRAL = "neutral"
"""Stands where a motion's name would, for a caption that asks for none."""

PLAIN = 0.3
"""Share of the captions that are the motion alone."""


def caption(name: str, random: Random, language: Language | None = None, *, plain: float = PLAIN) -> str:
    """A prompt that asks for the motion `name` (or for none: `NEUTRAL`), in either language when that is left open.

    `plain` is the chance that it asks for the motion and has nothing else.
    """
    language = language or _drawn(random)
    if name == NEUTRAL:
        return neutral(random, language)
    base, speed = name, "normal"
    if name.endswith(("-slow", "-fast")):
        base, _, speed = name.rpartition("-")
    if speed == "normal" and (base in ("darken", "brighten") or random.random() < 0.1 * ("+" in base)):
        speed = random.choice(("slow", "normal"))
    alone = random.random() < plain
    asked = _asked(base, speed, language, random, alone=alone)
    if alone:
        return _alone(asked, language, random)
    return _embedded(asked, language, random, tail=not base.startswith("object"))


def neutral(random: Random, language: Language | None = None) -> str:
    """A prompt that says nothing about motion; half of them are empty."""
    language = language or _drawn(random)
    if random.random() < 0.5:
        return ""
    opening, scene, style = (_pick(table, language, random) for table in (tables.OPENINGS, SCENES, tables.STYLES))
    if random.random() < 0.3:
        scene = _pick(tables.DISTRACTORS, language, random)
    if language == "en":
        return _cased(random.choice((f"{opening} {scene}", scene, f"{scene}, {style}", style, f"{scene}.")), random)
    return random.choice((opening, scene, f"{scene}，{style}", style, f"{scene}。", f"{opening}，{scene}"))


def _drawn(random: Random) -> Language:
    return "en" if random.random() < 0.5 else "zh"


def _pick(table: Mapping[str, str], language: str, random: Random) -> str:
    return random.choice(split(table[language]))


def _asked(base: str, speed: str, language: str, random: Random, *, alone: bool) -> str:
    """The motion, as a clause, an order or a noun; beside a scene a pan is named as one."""
    if base not in PHRASES or ("+" in base and random.random() < 0.5):
        return _joined(base.split("+"), speed, language, random)
    phrase = random.choice(PHRASES[base][language])
    if not base.startswith("object"):
        # "A boat, moving left" is the boat's motion.
        doubtful = base.startswith("pan") and not alone and not any(word in phrase for word in tables.CAMERA_VERBS)
        subject = _pick(tables.CAMERAS, language, random) if doubtful or random.random() < 0.6 else ""
        forms = ("clause", "gerund") if doubtful else ("clause", "order", "gerund")
        return _spoken(phrase, subject, speed, language, random, forms=forms)
    thing = _pick(tables.THINGS if random.random() < 0.75 else SCENES, language, random)
    asked = _spoken(phrase, thing, speed, language, random, forms=("clause", "clause", "gerund"))
    if random.random() < 0.6:
        return asked
    fixed = _pick(tables.FIXED, language, random)
    joint = "，" if language == "zh" else " " if fixed.startswith("while") else ", "
    return joint.join((asked, fixed) if joint == " " or random.random() < 0.8 else (fixed, asked))


def _joined(names: list[str], speed: str, language: str, random: Random) -> str:
    """Two motions at once; darkening, which has a subject of its own, comes second."""
    if "darken" not in names:
        names = random.sample(names, len(names))
    first, second = (random.choice(PHRASES[name][language]) for name in names)
    subject = _pick(tables.CAMERAS, language, random) if random.random() < 0.6 else ""
    joint = random.choice(tables.JOINTS[language].split("|"))
    if language == "zh":
        one, other = (phrase.translate({ord("["): None, ord("]"): None}) for phrase in (first, second))
        if first.startswith("[") and second.startswith("[") and random.random() < 0.3:
            side = random.choice(("一边", "边"))
            return f"{subject}{side}{one}{side}{other}"
        return _spoken(first, subject, speed, "zh", random) + joint + _spoken(second, "", "normal", "zh", random)
    form = random.choice(("clause", "order", "gerund"))
    follow = form
    if random.random() < 0.4:
        joint, follow = random.choice(
            ((" while ", "gerund"), (" as ", "clause"), (", ", "gerund"), (" with ", "gerund"))
        )
    again = _pick(tables.CAMERAS, "en", random) if follow == "clause" and joint == " as " else ""
    one = _spoken(first, subject, speed, "en", random, forms=(form,))
    return one + joint + _spoken(second, again, "normal", "en", random, forms=(follow,))


def _spoken(
    phrase: str,
    subject: str,
    speed: str,
    language: str,
    random: Random,
    forms: tuple[str, ...] = ("clause", "order", "gerund"),
) -> str:
    """A phrase with its verb inflected, its subject and its speed."""
    before, _, rest = phrase.partition("[")
    predicate, _, after = rest.partition("]")
    how = random.choice(split(tables.HOW[language][speed]))
    if language == "zh":
        if not rest:
            return how + phrase if random.random() < 0.7 or not how else f"{phrase}，{how}"
        return (before or subject) + how + predicate + after
    if not rest:
        return _english(_qualified(phrase, how, speed, random), random)
    subject, form = before.strip() or subject, random.choice(forms)
    verb = predicate if form == "order" and not before else _inflected(predicate, subject, form)
    if form == "order" and not before:
        subject = ""
    elif form == "clause" and not subject:
        verb = _inflected(predicate, "the camera", form)
    early = how.endswith("ly") and " " not in how and random.random() < 0.5
    words = (subject, how, verb, after) if early else (subject, verb, after, how)
    return _english(" ".join(" ".join(words).split()), random)


def _qualified(phrase: str, how: str, speed: str, random: Random) -> str:
    """A complete phrase with its speed, before it or after it."""
    if random.random() < 0.4:
        return f"{phrase} {how}".strip()
    adjective = random.choice(split(tables.ADJECTIVES[speed]))
    article, bare = ("a ", phrase[2:]) if phrase.startswith("a ") else ("", phrase)
    return f"{article}{adjective} {bare}" if adjective else phrase


def _english(text: str, random: Random) -> str:
    return text.replace("counterclockwise", random.choice(tables.COUNTER))


def _inflected(verb: str, subject: str, form: str) -> str:
    """The third person, or the gerund."""
    if form == "gerund":
        stem = verb + verb[-1] if verb in tables.DOUBLED else verb[:-1] if verb.endswith("e") else verb
        return stem + "ing"
    if subject in ("we", "the lights"):
        return verb
    if verb.endswith(("sh", "ch", "ss", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb in ("fly", "carry") else verb + "s"


def _alone(asked: str, language: str, random: Random) -> str:
    if language == "zh":
        return asked
    return _cased(random.choice((asked, asked, f"{asked}.", f"please {asked}")), random)


def _embedded(asked: str, language: str, random: Random, *, tail: bool) -> str:
    """A request inside a prompt such as people write: with a scene, a style, capitals and full stops."""
    spoken = random.choice(("en", "zh")) if random.random() < 0.05 else language
    scene = _pick(tables.DISTRACTORS if random.random() < 0.1 else SCENES, spoken, random)
    parts = [scene, asked] if random.random() < 0.7 else [asked, scene]
    if random.random() < 0.1:
        parts = [scene, _pick(SCENES, spoken, random), asked]
    if random.random() < 0.35:
        parts.insert(random.choice((0, len(parts), len(parts))), _pick(tables.STYLES, language, random))
    if language == "zh":
        if tail and random.random() < 0.1:
            return asked + random.choice(("，拍摄", "，展示", "，露出", "，拍到")) + scene
        return random.choice(("，", "，", "。", " ", ",", "；")).join(parts) + random.choice(("", "", "。"))
    if tail and random.random() < 0.2:
        joint = random.choice(
            ("over", "across", "past", "to show", "to reveal", "on", "from", "towards", "along", "of")
        )
        return _cased(f"{asked} {joint} {scene}", random)
    if random.random() < 0.4:
        return ". ".join(part[:1].upper() + part[1:] for part in parts) + "."
    return _cased(random.choice((", ", ", ", " - ", "; ", ": ", ". ", " ")).join(parts), random)


def _cased(text: str, random: Random) -> str:
    chance = random.random()
    if chance < 0.35:
        text = text[:1].upper() + text[1:]
    elif chance < 0.37:
        text = text.upper()
    elif chance < 0.4:
        text = text.title()
    return text + random.choice(("", "", "", ".", "!"))
