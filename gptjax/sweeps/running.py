# SPDX-License-Identifier: Apache-2.0
"""Running the points of a sweep on this machine: what is done is skipped, what broke goes on."""

import logging
import pathlib
from collections.abc import Mapping

import ml_collections

from gptjax.configs import base, errors
from gptjax.runtime import jobs, results
from gptjax.storage import documents
from gptjax.sweeps import live, states
from gptjax.sweeps import points as points_lib

_log = logging.getLogger('gptjax')


def run(
    points: Mapping[str, points_lib.Point],
    root: pathlib.Path,
    config: ml_collections.ConfigDict,
    room: jobs.Room,
) -> None:
    """Runs all that is not done, several at a time, cheapest first.

    Raises:
      InputError: some points failed or diverged; the message names them.
      program.Preempted: a signal came; all points were stopped and saved.
    """
    wanted = points_lib.read(root)['points']
    documents.write(root / base.OF_RUN, base.plain(config))
    looks = {name: states.look(root, name, wanted[name]) for name in points}
    done = {name for name, look in looks.items() if _is_done(root, points[name], look)}
    todo = [job for job in points_lib.jobs_of(points, root, config) if job.name not in done]
    todo = [job._replace(after=job.after - done) for job in todo]
    if done:
        _log.info('%d of %d points are done already', len(done), len(points))
    for name in points.keys() - done:
        states.note_failure(root, name, '')
    with live.Board(points, len(room.slots)) as board:

        def show(now: Mapping[str, str]) -> None:
            if board.is_due():
                if now.get(points_lib.LAST_PREPARED) == jobs.DONE:
                    points_lib.note_prepared(root, config)
                board.show(_looks(root, points, wanted, now))

        def is_hopeless(job: jobs.Job) -> bool:
            return bool(results.diverged(points_lib.folder(root, job.name)))

        ended = jobs.run(todo, room, is_hopeless, show)
        for name in points.keys() & ended.keys():
            if ended[name] == jobs.FAILED:
                states.note_failure(root, name, jobs.last_line(points_lib.log_path(root, name)))
        board.show(_looks(root, points, wanted, ended), last=True)
    _complain(ended, root)


def _looks(
    root: pathlib.Path,
    points: Mapping[str, points_lib.Point],
    wanted: Mapping[str, Mapping],
    now: Mapping[str, str],
) -> dict[str, states.Look]:
    """The points as their workdirs tell, in the states that they have here."""
    found = {}
    for name in points:
        look = states.look(root, name, wanted[name])
        state = now.get(name, look.state)
        keeps = look.state in (states.DIVERGED, states.STOPPED)
        stays = keeps and state in (jobs.FAILED, jobs.WAITING)
        found[name] = look if stays else look._replace(state=state)
    return found


def _is_done(root: pathlib.Path, point: points_lib.Point, look: states.Look) -> bool:
    """Whether its run is at its end, by the config that the point has now."""
    if look.state != jobs.DONE:
        return False
    there = points_lib.folder(root, point.name) / base.OF_RUN
    try:
        return documents.read(there, dict, '') == base.plain(point.config)
    except documents.Damaged:
        return False


def _complain(ended: Mapping[str, str], root: pathlib.Path) -> None:
    failed = [name for name, state in ended.items() if state in (jobs.FAILED, jobs.BLOCKED)]
    if failed:
        raise errors.InputError(
            f'{len(failed)} of {len(ended)} did not get to their end: {", ".join(failed)}; what '
            f'they said is in {root / "logs"}; the same command tries them again'
        )
