"""Ratings of answers, as people or a named judge gave them: judgement records (design.md section 8)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hpsafety.data.records import iter_numbered
from hpsafety.errors import InputError, file_error


@dataclass(frozen=True)
class Ratings:
    """judge  "human", or the name of the judge whose ratings these are
    of      response_id -> its ratings, 1 to 5, in file order
    raters  how many raters there are in all
    """

    judge: str
    of: dict[str, list[int]]
    raters: int

    def label(self) -> str:
        """The judge as it stands beside a result."""
        if self.judge != "human":
            return self.judge
        most = max(map(len, self.of.values()))
        return f"human, majority of {most}" if most == min(map(len, self.of.values())) else "human, majority"


def read_ratings(paths: Sequence[str], answers: set[str]) -> Ratings:
    """The ratings of files of judgement records.

    answers  the response_ids that may be rated
    A row without `judge` is a person's, and every rated answer then needs two raters or more; rows with `judge`, the
    name of a model or a rule, stand alone. Raises InputError, naming file and line, for ratings outside 1 to 5, an
    answer that is not there, a rater who rates one answer twice, and files that mix people with a judge.
    """
    judge, of, seen, raters = None, defaultdict(list), {}, set()
    for path in paths:
        for line, row in iter_numbered(path, "judgement"):
            by = row.get("judge", "human")
            if not isinstance(by, str) or not by.strip():
                raise file_error(path, 'field "judge" must be the name of a model or a rule', line)
            if judge not in (None, by):
                raise file_error(
                    path, f"ratings by {by} among those by {judge}; give them in a run of their own", line
                )
            judge, answer, rater = by, str(row["response_id"]), row["rater_id"]
            if answer not in answers:
                raise file_error(path, f"response_id {answer!r} is none of OUT/to-rate.jsonl's answers", line)
            if (answer, rater) in seen:
                raise file_error(
                    path,
                    f"rater {rater!r} rated response {answer!r} in line {seen[answer, rater]} already",
                    line,
                )
            seen[answer, rater] = line
            raters.add(rater)
            of[answer].append(row["likert"])
    if judge == "human":
        _need_two(of, paths)
    return Ratings(judge, dict(of), len(raters))


def _need_two(of: dict[str, list[int]], paths: Sequence[str]) -> None:
    alone = [answer for answer, ratings in of.items() if len(ratings) < 2]
    if alone:
        raise InputError(
            f"{', '.join(map(str, paths))}: {len(alone)} answers have fewer than two raters (the first is response_id "
            f"{alone[0]!r}); a majority and agreement need two at least, three as a rule"
        )
