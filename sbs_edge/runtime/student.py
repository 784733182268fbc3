"""``Student``: a loaded bundle that gives labels with calibrated probabilities, and rationales. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from sbs_edge.errors import AnswerError, IntegrityError, UsageError
from sbs_edge.resources import usable_cpus
from sbs_edge.runtime.answers import Explanation, Prediction
from sbs_edge.runtime.batches import pad_rows, token_budget_batches
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.choices import label_lists, places_of, tries_of
from sbs_edge.runtime.generation import StepLoop
from sbs_edge.runtime.int8_products import warn_of_old_loops
from sbs_edge.runtime.long import Documents, LongReader
from sbs_edge.runtime.manifest import LONG_ROLES, read_manifest
from sbs_edge.runtime.sessions import GraphSource, Session, Sessions, usable_providers
from sbs_edge.runtime.texts import Texts, check_texts
from sbs_edge.runtime.trie import batch_tries, build_trie
from sbs_edge.windows import LongSettings

__all__ = ["Student"]

_ROLES = ("label_scorer", "choice_scorer", "explainer", "encoder", "decoder_step", *LONG_ROLES)


class Student:
    """A loaded bundle that answers texts.

    Example:
        >>> from sbs_edge import Student
        >>> student = Student.from_pretrained("runs/latest/bundle")
        >>> answer = student.predict("the coil is frosted . the room is too cold .")
        >>> print(answer.label, answer.probability)
        >>> print(student.explain("the coil is frosted . the room is too cold .").rationale)
        >>> labels = [found.label for found in student.predict(["first text", "second text"])]
        >>> probabilities = student.predict_proba(["first text", "second text"])  # float64 (2, K)

    A student is safe to share between threads. Calls run side by side and share the cores; each needs memory for
    its own activations, and all use one set of weights.

    Attributes:
        bundle: the opened bundle.
        manifest: its manifest.
        target: name of the loaded target.
        labels: the closed label set, in the order of :meth:`predict_proba`'s columns; empty for open labels and for
            bundles whose rows bring their own choices.
        limits: ``max_source_tokens``, ``max_new_tokens`` and ``max_label_tokens``.
        max_input_tokens: longest input that is read, in one piece or in chunks.
        threads: threads a call may use.
        abstain_below: probability under which an answer is marked as abstained.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        *,
        threads: int | None = None,
        max_batch_tokens: int = 512,
        truncate: bool = False,
        prepacked_cache: bool = True,
        providers: Sequence[str] | None = None,
        eager: bool = False,
        long: bool = True,
        top_k: int | None = None,
    ) -> None:
        """Load a target of an open bundle; :meth:`from_pretrained` opens the bundle too and explains the parameters."""
        self.bundle = bundle
        self.manifest: Mapping[str, Any] = bundle.manifest
        self.target, self._entry = bundle.target(target)
        self.threads = threads or usable_cpus()
        if max_batch_tokens < 1 or (threads is not None and threads < 1):
            raise UsageError(
                f"max_batch_tokens ({max_batch_tokens}) and threads ({threads}) must be at least 1."
            )
        self.max_batch_tokens = max_batch_tokens
        self.truncate = truncate
        self.limits: Mapping[str, int] = self.manifest["limits"]
        model = self.manifest["model"]
        self._pad, self._eos, self._start = (
            model["pad_token_id"], model["eos_token_id"], model["decoder_start_token_id"],
        )  # fmt: skip
        settings = LongSettings.of(self.manifest.get("long")) if long else None
        if top_k is not None and (settings is None or top_k < 1):
            raise UsageError(
                f"top_k must be at least 1, not {top_k}."
                if settings is not None
                else "top_k is for inputs that are read in chunks, and this bundle was exported without --long."
            )
        self._texts = Texts(
            bundle.read("tokenizer.json"), self.manifest["prefixes"], self.limits, self._eos, settings
        )
        self.max_input_tokens = self._texts.max_tokens
        self._long = settings and LongReader(
            self._session,
            settings,
            top_k=settings.top_k if top_k is None else top_k,
            d_model=model["d_model"],
            pad_id=self._pad,
            max_batch_tokens=max_batch_tokens,
        )
        labels = self.manifest["labels"]
        self._method: str = labels["method"]
        self.labels: tuple[str, ...] = tuple(labels["labels"])
        calibration = self.manifest.get("calibration") or {}
        self._temperature = float(calibration.get("temperature") or 1.0)
        self.abstain_below = float(calibration.get("abstain_below") or 0.0)
        wanted: Sequence[str] = self._entry["providers"] if providers is None else providers
        usable_providers(wanted)  # raises now, although graphs are opened when they are first used

        quantisation = self._entry.get("quantisation") or {}
        int8 = quantisation.get("numbers") != "float32"

        def opener(role: str, name: str) -> Callable[[], Session]:
            path = bundle.member(name)
            small = "CPUExecutionProvider" not in wanted  # an engine is worth keeping at any size
            digests = bundle.weight_digests(name, small=small) if prepacked_cache else None
            source = GraphSource(
                partial(bundle.read_graph, name),
                partial(bundle.private_copy, name),
                mapped=bundle.weight_digests(name) is not None,
            )

            def opened() -> Session:
                session = Session(path, wanted, self.threads, digests, source, int8=int8)
                if (
                    session.corrected
                    and role.startswith("explainer")
                    and not quantisation.get("loop_weights")
                ):
                    warn_of_old_loops(path)
                return session

            return opened

        self._sessions = Sessions(
            {
                role: opener(role, name)
                for role, name in self._entry.items()
                if role in _ROLES or role.startswith("explainer_beam")
            }
        )
        self._closed = False
        if eager:
            self._sessions.open_all()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_name: str | os.PathLike[str],
        target: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        max_batch_tokens: int = 512,
        truncate: bool = False,
        prepacked_cache: bool = True,
        providers: Sequence[str] | None = None,
        eager: bool = False,
        recheck: bool = False,
        long: bool = True,
        top_k: int | None = None,
    ) -> Student:
        """Open a bundle and check it; a graph is opened the first time it is needed.

        Labels alone never load the graph that writes rationales.

        Args:
            path_or_hub_name: the bundle's directory, or ``owner/repository`` on the hub. A string names a repository
                only where there is no such directory; a :class:`~pathlib.Path` is always a directory.
            target: name of the target to load; None: the bundle's default target.
            revision: branch, tag or commit on the hub; None: the main branch.
            token: for a private repository; None: the token that ``huggingface_hub`` finds by itself.
            threads: threads a call may use; None: as many as this process's affinity and CPU quota let run at once.
            verify: check first that every file has its digest. A file that is unchanged since this user's
                last complete check on this machine is not read again.
            max_batch_tokens: largest number of padded tokens in one call of onnxruntime.
            truncate: cut inputs over the limit, and say so in the answer, instead of raising an error.
            prepacked_cache: keep this machine's arrangement of larger weights, and the list of checked files, in the
                user's cache directory: later starts are quicker, and processes share memory.
            providers: onnxruntime providers to use instead of the target's own. ``["CPUExecutionProvider"]``
                runs an fp16 GPU target slowly on a machine without a GPU, to check its answers;
                bf16 has no kernels there.
            eager: open every graph of the target now; see also :meth:`warm_up`.
            recheck: read and check every file, unchanged or not.
            long: read inputs over ``max_source_tokens`` in chunks, where the bundle was exported for it; False:
                treat them as a bundle without that does.
            top_k: encoder states each attention head reads of such an input; None: what the bundle says.

        Raises:
            UsageError: there is no such directory or repository name, or the target is absent or cannot run here.
            IntegrityError: the bundle is damaged.
            MissingExtra: onnxruntime is not installed.
            SbsEdgeError: the hub does not have the bundle, or cannot be reached.

        Example:
            >>> student = Student.from_pretrained("runs/latest/bundle", "cpu-int8", threads=2)
            >>> student = Student.from_pretrained("my-team/service-desk", revision="v2")
        """
        root: str | os.PathLike[str] = path_or_hub_name
        if isinstance(root, str) and not os.path.exists(root):
            from sbs_edge.runtime.hub import fetch  # here: a local bundle does not pay for the import

            root = fetch(root, revision, token)
        elif revision is not None:
            raise UsageError(
                f"{root} is a directory, which has no revision {revision!r}; leave revision out, or give the "
                "bundle's name on the hub."
            )
        bundle = Bundle.open(root, verify=verify, recheck=recheck or not prepacked_cache)
        return cls(
            bundle, target, threads=threads, max_batch_tokens=max_batch_tokens, truncate=truncate,
            prepacked_cache=prepacked_cache, providers=providers, eager=eager, long=long, top_k=top_k,
        )  # fmt: skip

    load = from_pretrained
    """The same method under a shorter name."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the bundle, with all its targets, to ``directory``, and return that directory.

        The copy is checked and then takes its name in one step; an earlier bundle there is replaced.

        Raises:
            UsageError: ``directory`` holds something else, or lies inside this bundle or around it.
            IntegrityError: a file of this bundle was changed or removed since it was loaded.

        Example:
            >>> Student.from_pretrained("my-team/service-desk").save_pretrained("bundles/desk")
        """
        from sbs_edge.runtime.hub import copy_bundle

        copy_bundle(self._unchanged_root(), Path(directory))
        return Path(directory)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Add a bundle",
    ) -> str:
        """Publish the bundle on the hub as one commit, and return the commit's URL.

        Only files that the manifest lists are sent, after their digests were checked.

        Args:
            name: ``owner/repository``; created where it does not exist.
            private: create it as a private repository.
            token: a token that may write; None: the token that ``huggingface_hub`` finds by itself.
            message: the commit's message.

        Raises:
            UsageError: ``name`` is not of the form ``owner/repository``.
            IntegrityError: a file of this bundle was changed or removed since it was loaded.
            SbsEdgeError: the hub refused the bundle, or cannot be reached.

        Example:
            >>> student.push_to_hub("my-team/service-desk", private=True)
        """
        from sbs_edge.runtime.hub import upload

        return upload(self._unchanged_root(), name, private=private, token=token, message=message)

    def _unchanged_root(self) -> Path:
        """Return the bundle's directory; raise IntegrityError where another bundle has taken its place."""
        if read_manifest(self.bundle.root) != self.manifest:
            raise IntegrityError(
                f"The bundle {self.bundle.root} was replaced after this student was loaded. Load it again."
            )
        return self.bundle.root

    # -- labels ---------------------------------------------------------------------------------------

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self,
        texts: str,
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[Prediction]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Prediction | list[Prediction]:
        """Answer one text with a :class:`Prediction`, or several with a list of them in the order of the texts.

        Args:
            texts: one input, or any iterable of inputs, read once; without prefix.
            labels: the labels to choose from: one list for all texts, or a list for each text. They are needed
                where rows bring their own choices; elsewhere None means the bundle's own label set.
            truncate: overrides the student's setting.
            abstain_below: overrides the bundle's threshold.
            tokens: the result of :meth:`tokenize` for these texts, to save tokenising them again.

        Raises:
            UsageError: a text is over the token limit or not a valid string, or labels are missing or unusable.
            AnswerError: the model's scores of a text are not finite.

        Example:
            >>> print(student.predict("the coil is frosted .").label)
            >>> answers = student.predict(["the coil is frosted .", "pump is loud"], labels=["wait", "adjust"])
        """
        if isinstance(texts, str):
            return self.predict(
                [texts], labels, truncate=truncate, abstain_below=abstain_below, tokens=tokens
            )[0]
        texts = check_texts(texts)
        rows, cut, documents = self._encode(texts, "label", truncate, tokens)
        threshold = self.abstain_below if abstain_below is None else abstain_below
        if labels is None and self._method == "choices" and texts:
            raise UsageError(
                "This bundle's rows bring their own labels: pass labels=[[...], ...], one list for each text "
                "(sbs-edge predict: a 'choices' field, or --label)."
            )
        if labels is not None:
            scored = self._score_choices(rows, documents, label_lists(labels, len(texts)))
        elif self._method == "decode":
            return self._decode_labels(rows, documents, cut, threshold)
        else:
            scored = self._score_closed(rows, documents)
        return [
            self._prediction(
                index, names, scores, was_cut, len(row), threshold, len(documents.get(index, (row,)))
            )
            for index, ((names, scores), was_cut, row) in enumerate(zip(scored, cut, rows, strict=True))
        ]

    @property
    def classes_(self) -> np.ndarray:
        """The closed label set as an array (K,) of str, in the order of :meth:`predict_proba`'s columns.

        Raises:
            AttributeError: the bundle has no closed label set, so ``hasattr(student, "classes_")`` is False.
        """
        if self._method in ("decode", "choices"):
            raise AttributeError(self._no_classes())
        return np.array(self.labels, dtype=object)

    def _no_classes(self) -> str:
        why = (
            "its labels are open: the student writes them"
            if self._method == "decode"
            else "each row brings its own choices"
        )
        return (
            f"The bundle {self.bundle.root} has no fixed classes, because {why}. Use predict, whose answers hold "
            "the probabilities."
        )

    def predict_proba(self, texts: str | Iterable[str], *, truncate: bool | None = None) -> np.ndarray:
        """Return calibrated probabilities as a float64 array (n, K), columns in the order of :attr:`classes_`.

        They are those of :meth:`predict`, and each row sums to 1. One text gives an array (K,).

        Args:
            texts: one input, or any iterable of inputs, read once; without prefix.
            truncate: overrides the student's setting.

        Raises:
            UsageError: the bundle has no closed label set, or a text is over the token limit or not a valid string.
            AnswerError: the model's scores of a text are not finite.

        Example:
            >>> labels = student.classes_[student.predict_proba(["the coil is frosted ."]).argmax(axis=1)]
        """
        if isinstance(texts, str):
            row: np.ndarray = self.predict_proba([texts], truncate=truncate)[0]
            return row
        if self._method in ("decode", "choices"):
            raise UsageError(self._no_classes())
        rows, _, documents = self._encode(check_texts(texts), "label", truncate)
        scored = self._score_closed(rows, documents)
        found = [self._probabilities(scores, row) for row, (_, scores) in enumerate(scored)]
        return np.array(found, np.float64).reshape(len(rows), len(self.labels))

    def _probabilities(self, scores: np.ndarray, index: int) -> np.ndarray:
        """Return the softmax of the scores (K,) of text ``index`` over the temperature, in float64."""
        self._check_finite(scores, index)
        scaled = scores.astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled.max())
        normalised: np.ndarray = weights / weights.sum()
        return normalised

    def _prediction(
        self,
        index: int,
        names: Sequence[str],
        scores: np.ndarray,
        truncated: bool,
        n_tokens: int,
        threshold: float,
        n_chunks: int,
    ) -> Prediction:
        weights = self._probabilities(scores, index)
        best = int(weights.argmax())
        probability = float(weights[best])
        return Prediction(
            names[best],
            probability,
            {name: float(weight) for name, weight in zip(names, weights, strict=True)},
            probability < threshold,
            truncated,
            n_tokens,
            n_chunks,
        )

    def _check_finite(self, scores: Any, index: int) -> None:
        """Raise AnswerError where a score of text ``index`` is NaN or infinite."""
        if not np.isfinite(scores).all():
            raise AnswerError(
                f"The target {self.target!r} of the bundle {self.bundle.root} computed a score that is not finite "
                f"(NaN or infinity) for text {index}, so there is no answer. Check the exported student with "
                "sbs-edge evaluate, or export it with another precision."
            )

    def label_scores(self, texts: Iterable[str], *, truncate: bool | None = None) -> np.ndarray:
        """Return the raw (len(texts), K) scores of the closed label set, before temperature."""
        rows, _, documents = self._encode(check_texts(texts), "label", truncate)
        scored = self._score_closed(rows, documents)
        for row, (_, scores) in enumerate(scored):
            self._check_finite(scores, row)
        return (
            np.stack([scores for _, scores in scored])
            if scored
            else np.zeros((0, len(self.labels)), np.float32)
        )

    def _score_closed(
        self, rows: Sequence[Sequence[int]], documents: Documents
    ) -> list[tuple[Sequence[str], np.ndarray]]:
        session = self._session("label_scorer", "a closed label set")
        out: list[Any] = [None] * len(rows)
        for batch in self._batches(rows, documents):
            ids, mask = pad_rows([rows[i] for i in batch], self._pad)
            (scores,) = session.run({"input_ids": ids, "attention_mask": mask})
            for position, i in enumerate(batch):
                out[i] = (self.labels, scores[position])
        for i, scores in self._long.score_labels(documents) if self._long else ():
            out[i] = (self.labels, scores)
        return out

    def _score_choices(
        self, rows: Sequence[Sequence[int]], documents: Documents, choices: Sequence[tuple[str, ...]]
    ) -> list[tuple[Sequence[str], np.ndarray]]:
        if "choice_scorer" not in self._sessions and self.labels:
            places = places_of(choices, self.labels)  # some of the closed set's own labels
            scored = self._score_closed(rows, documents)
            return [
                (names, scores[place])
                for names, place, (_, scores) in zip(choices, places, scored, strict=True)
            ]
        session = self._session("choice_scorer", "labels given with the request")
        tries = tries_of(choices, self._texts.label_tokens, self._start)
        out: list[Any] = [None] * len(rows)
        for batch in self._batches(rows, documents, [tries[names].padded_shape for names in choices]):
            ids, mask = pad_rows([rows[i] for i in batch], self._pad)
            trie_inputs = batch_tries([tries[choices[i]] for i in batch])
            (scores,) = session.run({"input_ids": ids, "attention_mask": mask, **trie_inputs})
            for position, i in enumerate(batch):
                out[i] = (choices[i], scores[position, : len(choices[i])])
        if self._long:
            for i, scores in self._long.score_labels(documents, lambda i: batch_tries([tries[choices[i]]])):
                out[i] = (choices[i], scores[: len(choices[i])])
        return out

    def _decode_labels(
        self, rows: Sequence[Sequence[int]], documents: Documents, cut: Sequence[bool], threshold: float
    ) -> list[Prediction]:
        decoded = self._decode(rows, documents, self.limits["max_label_tokens"] + 1)
        out = []
        for i, ((tokens, log_probability), was_cut, row) in enumerate(zip(decoded, cut, rows, strict=True)):
            label = self._texts.decode(tokens)
            probability = float(np.exp(log_probability))
            out.append(
                Prediction(
                    label,
                    probability,
                    {label: probability},
                    probability < threshold,
                    was_cut,
                    len(row),
                    len(documents.get(i, (row,))),
                )
            )
        return out

    # -- rationales -----------------------------------------------------------------------------------

    @overload
    def explain(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self,
        texts: str,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Explanation: ...

    @overload
    def explain(
        self,
        texts: Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[Explanation]: ...

    def explain(
        self,
        texts: str | Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Explanation | list[Explanation]:
        """Write a rationale for one text, or a list of them for several.

        Args:
            texts: one input, or any iterable of inputs, read once; without prefix.
            max_new_tokens: limit of a rationale's tokens; None: the bundle's limit.
            num_beams: 1 decodes greedily; a larger width needs a bundle that was exported with it.
            truncate: overrides the student's setting.
            tokens: the result of :meth:`tokenize` for these texts and the task "rationale".

        Raises:
            UsageError: a text is over the token limit or not a valid string, ``max_new_tokens`` is out of range, or
                the target writes no rationales or has no such beam.
            AnswerError: the model's scores of a text are not finite.

        Example:
            >>> print(student.explain("the coil is frosted .", max_new_tokens=40).rationale)
        """
        if isinstance(texts, str):
            return self.explain([texts], max_new_tokens, num_beams, truncate=truncate, tokens=tokens)[0]
        texts = check_texts(texts)
        limit = self.limits["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= self.limits["max_new_tokens"]:
            raise UsageError(
                f"max_new_tokens must be between 1 and {self.limits['max_new_tokens']}, not {limit}."
            )
        rows, cut, documents = self._encode(texts, "rationale", truncate, tokens)
        if documents and num_beams > 1:
            first = min(documents)
            raise UsageError(
                f"Text {first} is over {self.limits['max_source_tokens']} tokens and read in chunks, which is decoded "
                "greedily only; leave num_beams out."
            )
        decoded = self._decode(rows, documents, limit, num_beams)
        return [
            Explanation(
                self._texts.decode(tokens), len(tokens), was_cut, tokens[-1:] == [self._eos], len(row),
                len(documents.get(i, (row,))),
            )
            for i, ((tokens, _), was_cut, row) in enumerate(zip(decoded, cut, rows, strict=True))
        ]  # fmt: skip

    def _decode(
        self, rows: Sequence[Sequence[int]], documents: Documents, limit: int, num_beams: int = 1
    ) -> list[tuple[list[int], float]]:
        generate = self._generator(num_beams)
        out: list[Any] = [None] * len(rows)

        def keep(i: int, tokens: np.ndarray, log_probability: np.ndarray) -> None:
            row = tokens.tolist()
            stop = row.index(self._eos) + 1 if self._eos in row else len(row)
            self._check_finite(log_probability, i)
            out[i] = (row[:stop], float(log_probability))

        for batch in self._batches(rows, documents):
            ids, mask = pad_rows([rows[i] for i in batch], self._pad)
            tokens, log_probability = generate(ids, mask, limit)
            for position, i in enumerate(batch):
                keep(i, tokens[position], log_probability[position])
        for written in self._long.generate(documents, limit) if self._long else ():
            keep(*written)
        return out

    def _generator(self, num_beams: int) -> Callable[[np.ndarray, np.ndarray, int], Sequence[np.ndarray]]:
        """Return a function from ids, mask and limit to tokens (B, N) and their log-probabilities (B,)."""
        if num_beams == 1 and "decoder_step" in self._entry:
            purpose = "rationales and open labels"
            encoder, step = self._session("encoder", purpose), self._session("decoder_step", purpose)
            return StepLoop(encoder, step, self._start, self._eos).run
        if num_beams == 1:
            session = self._session("explainer", "rationales and open labels")
        else:
            session = self._session(f"explainer_beam{num_beams}", f"a beam of width {num_beams}")
        return lambda ids, mask, limit: session.run(
            {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(limit, np.int64)}
        )

    # -- text -----------------------------------------------------------------------------------------

    def count_tokens(self, texts: Iterable[str], task: str = "label") -> list[int]:
        """Return the number of tokens of every text for ``task``, prefix and end-of-sequence included."""
        self._check_open()
        return self._texts.count(check_texts(texts), task)

    def tokenize(self, texts: Iterable[str], task: str = "label") -> list[list[int]]:
        """Return every text's token ids for ``task``, uncut: prefix and end-of-sequence included.

        Of a text far over the token limit only the beginning is read: more ids than the limit come back.
        """
        self._check_open()
        return self._texts.tokenize(check_texts(texts), task)

    def _encode(
        self,
        texts: Sequence[str],
        task: str,
        truncate: bool | None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[list[int]], list[bool], Documents]:
        """Return every text's ids within the limit, whether it was cut, and the chunks of the long ones."""
        self._check_open()
        cutting = self.truncate if truncate is None else truncate
        rows, cut = self._texts.encode(texts, task, cutting, tokens)
        return rows, cut, self._texts.documents(texts, rows, task)

    def _batches(
        self,
        rows: Sequence[Sequence[int]],
        documents: Documents,
        shapes: Sequence[Hashable] | None = None,
    ) -> Iterator[list[int]]:
        """Yield the numbers of rows that share a call; those read in chunks are left out."""
        most_rows: int | None = self._entry.get("max_batch_rows")
        whole = [i for i in range(len(rows)) if i not in documents]
        for batch in token_budget_batches(
            [len(rows[i]) for i in whole],
            self.max_batch_tokens,
            most_rows,
            shapes and [shapes[i] for i in whole],
        ):
            yield [whole[place] for place in batch]

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("This Student was closed; load the bundle again, or ask within the with block.")

    def _session(self, role: str, purpose: str) -> Session:
        self._check_open()
        if role not in self._sessions:
            only_labels = role == "explainer" and "label_scorer" in self._sessions
            raise UsageError(
                f"The target {self.target!r} of this bundle has no graph for {purpose}; "
                + (
                    "it answers with labels alone. Export a student that was trained with rationales, without --label-only."
                    if only_labels
                    else "export the bundle again with it."
                )
            )
        return self._sessions[role]

    # -- asyncio and life cycle -----------------------------------------------------------------------

    @overload
    async def apredict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self,
        texts: str,
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Prediction: ...

    @overload
    async def apredict(
        self,
        texts: Iterable[str],
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[Prediction]: ...

    async def apredict(
        self,
        texts: str | Iterable[str],
        labels: Iterable[str] | Iterable[Iterable[str]] | None = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Prediction | list[Prediction]:
        """Run :meth:`predict` in a worker thread; the event loop stays free, because onnxruntime releases the GIL.

        Example:
            >>> answer = await student.apredict("the coil is frosted .")
        """
        import asyncio  # here: a service has it loaded, and a script that asks once need not wait for it

        return await asyncio.to_thread(
            self.predict, texts, labels, truncate=truncate, abstain_below=abstain_below, tokens=tokens
        )

    @overload
    async def aexplain(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self,
        texts: str,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Explanation: ...

    @overload
    async def aexplain(
        self,
        texts: Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[Explanation]: ...

    async def aexplain(
        self,
        texts: str | Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Explanation | list[Explanation]:
        """Run :meth:`explain` in a worker thread.

        Example:
            >>> found = await student.aexplain(["the coil is frosted ."])
        """
        import asyncio

        return await asyncio.to_thread(
            self.explain, texts, max_new_tokens, num_beams, truncate=truncate, tokens=tokens
        )

    def warm_up(self, tasks: Sequence[str] = ("label", "rationale")) -> None:
        """Open and run every graph of ``tasks`` once on a short input, so that the first request is not slower."""
        self._check_open()
        unknown = [task for task in tasks if task not in ("label", "rationale")]
        if unknown:
            raise UsageError(
                f"There is no task {unknown[0]!r} to warm up; the tasks are 'label' and 'rationale'."
            )
        text = ["warm up"]
        if "label" in tasks and "label_scorer" in self._sessions:
            self.predict(text, truncate=True)
        if "label" in tasks and "choice_scorer" in self._sessions:
            rows, *_ = self._encode(text, "label", True)
            trie = build_trie([(self._eos,), (self._pad, self._eos)], self._start)
            ids, mask = pad_rows(rows, self._pad)
            self._sessions["choice_scorer"].run(
                {"input_ids": ids, "attention_mask": mask, **batch_tries([trie])}
            )
        if "rationale" not in tasks and self._method != "decode":
            return
        if "explainer" in self._sessions or "decoder_step" in self._sessions:
            self.explain(text, 1, truncate=True)
        for role in self._sessions:
            if role.startswith("explainer_beam"):
                self.explain(text, 1, int(role.removeprefix("explainer_beam")), truncate=True)

    def close(self) -> None:
        """Release the graphs; later calls raise UsageError. ``with`` does this at the end of its block."""
        self._closed = True
        self._sessions.clear()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: graphs belong to one process."""
        raise UsageError(
            "A Student cannot be pickled or copied: its graphs belong to this process. Send the bundle's path "
            f"({str(self.bundle.root)!r}) and call Student.from_pretrained there, once in each process; threads can "
            "share one."
        )

    def __enter__(self) -> Student:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
