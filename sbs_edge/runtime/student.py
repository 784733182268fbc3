"""``Student``: a loaded bundle that gives labels with calibrated probabilities, and rationales. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypedDict, Unpack, overload

import numpy as np

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.resources import usable_cpus
from sbs_edge.runtime.answers import Explanation, Prediction, prediction_of, probabilities_of
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.choices import label_lists, places_of
from sbs_edge.runtime.graphs import TargetGraphs
from sbs_edge.runtime.long import Documents
from sbs_edge.runtime.manifest import read_manifest
from sbs_edge.runtime.texts import Texts, check_texts
from sbs_edge.windows import LongSettings

__all__ = ["Student"]

Labels: TypeAlias = Iterable[str] | Iterable[Iterable[str]] | None


class _CallOptions(TypedDict, total=False):
    """Keyword arguments of every call; :meth:`Student.predict` and :meth:`Student.explain` explain them."""

    truncate: bool | None
    tokens: Sequence[Sequence[int]] | None


class _PredictOptions(_CallOptions, total=False):
    abstain_below: float | None


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

    A student is safe to share between threads. Calls run in parallel and share the cores and the weights; each call
    needs memory for its own activations.

    Attributes:
        bundle: the opened bundle.
        manifest: its manifest.
        target: name of the loaded target.
        labels: the closed label set, in the order of :meth:`predict_proba`'s columns; empty for open labels and for
            bundles whose rows have their own choices.
        limits: ``max_source_tokens``, ``max_new_tokens`` and ``max_label_tokens``.
        max_input_tokens: longest input that is read, in one piece or in chunks.
        threads: threads per call.
        abstain_below: probability below which an answer is marked as abstained.
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
        """Load a target of an open bundle. :meth:`from_pretrained` also opens the bundle, and explains the parameters."""
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
        self._eos: int = self.manifest["model"]["eos_token_id"]
        settings = LongSettings.of(self.manifest.get("long")) if long else None
        if top_k is not None:
            if settings is None:
                why = "this bundle was exported without them" if long else "long=False leaves them out"
                raise UsageError(f"top_k is for inputs that are read in chunks, and {why}.")
            settings = replace(settings, top_k=top_k)
        self._texts = Texts(
            bundle.read("tokenizer.json"), self.manifest["prefixes"], self.limits, self._eos, settings
        )
        self.max_input_tokens = self._texts.max_tokens
        labels = self.manifest["labels"]
        self._method: str = labels["method"]
        self.labels: tuple[str, ...] = tuple(labels["labels"])
        calibration = self.manifest.get("calibration") or {}
        self._temperature = float(calibration.get("temperature") or 1.0)
        self.abstain_below = float(calibration.get("abstain_below") or 0.0)
        self._graphs = TargetGraphs(
            bundle, self.target, self._entry, threads=self.threads, max_batch_tokens=max_batch_tokens,
            providers=self._entry["providers"] if providers is None else providers, prepacked_cache=prepacked_cache,
            top_k=None if settings is None else settings.top_k,
        )  # fmt: skip
        self._sessions = self._graphs.sessions
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
        """Open a bundle and check it.

        A graph is opened at its first use, so labels alone never load the one that writes rationales.

        Args:
            path_or_hub_name: the bundle's directory, or ``owner/repository`` on the hub. A string names a repository
                only if there is no such directory; a :class:`~pathlib.Path` is always a directory.
            target: name of the target to load; None: the bundle's default target.
            revision: branch, tag or commit on the hub; None: the main branch.
            token: for a private repository; None: the token that ``huggingface_hub`` finds by itself.
            threads: threads per call; None: as many as this process's affinity and CPU quota allow.
            verify: check the digest of every file first. A file that is unchanged since this user's last complete
                check on this machine is not read again.
            max_batch_tokens: largest number of padded tokens in one call of onnxruntime.
            truncate: cut inputs over the limit, and say so in the answer, instead of raising an error.
            prepacked_cache: keep pre-packed weights and the list of checked files in the user's cache directory:
                later starts are faster, and processes share memory.
            providers: onnxruntime providers to use instead of the target's own. ``["CPUExecutionProvider"]``
                runs an fp16 GPU target slowly on a machine without a GPU, to check its answers;
                bf16 has no kernels there.
            eager: open every graph of the target now; see also :meth:`warm_up`.
            recheck: read and check every file, unchanged or not.
            long: read inputs over ``max_source_tokens`` in chunks, if the bundle was exported for it; False:
                treat them as a bundle without that does.
            top_k: encoder states each attention head reads of such an input; None: the bundle's setting.

        Raises:
            UsageError: there is no such directory or repository name, or the target is missing or cannot run here.
            IntegrityError: the bundle is damaged.
            MissingExtra: onnxruntime is not installed.
            SbsEdgeError: the hub does not have the bundle, or cannot be reached.

        Example:
            >>> student = Student.from_pretrained("runs/latest/bundle", "cpu-int8", threads=2)
            >>> student = Student.from_pretrained("my-team/service-desk", revision="v2")
        """
        root: str | os.PathLike[str] = path_or_hub_name
        if isinstance(root, str) and not os.path.exists(root):
            from sbs_edge.runtime.hub import fetch  # here, so that a local bundle does not wait for it

            root = fetch(root, revision, token)
        elif revision is not None:
            raise UsageError(
                f"{root} is a directory, which has no revision {revision!r}; leave out revision, or give the "
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

        The copy is checked, then renamed in one step. An earlier bundle there is replaced.

        Raises:
            UsageError: ``directory`` has other content, or is inside this bundle or around it.
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
            name: ``owner/repository``; created if it does not exist.
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
        """Return the bundle's directory; raise IntegrityError if another bundle has replaced it."""
        if read_manifest(self.bundle.root) != self.manifest:
            raise IntegrityError(
                f"The bundle {self.bundle.root} was replaced after this student was loaded. Load it again."
            )
        return self.bundle.root

    # -- labels ---------------------------------------------------------------------------------------

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, texts: str, labels: Labels = None, **options: Unpack[_PredictOptions]
    ) -> Prediction: ...

    @overload
    def predict(
        self, texts: Iterable[str], labels: Labels = None, **options: Unpack[_PredictOptions]
    ) -> list[Prediction]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        labels: Labels = None,
        *,
        truncate: bool | None = None,
        abstain_below: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Prediction | list[Prediction]:
        """Return a :class:`Prediction` for one text, or a list of them for several texts, in their order.

        Args:
            texts: one input, or any iterable of inputs, read once; without prefix.
            labels: the labels to choose from: one list for all texts, or a list for each text. They are required
                if the bundle's rows have their own choices; otherwise None means the bundle's label set.
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
                "The rows of this bundle have their own choices: pass labels=[[...], ...], a list for each text "
                "(in a file: the field 'choices')."
            )
        if labels is None and self._method == "decode":
            return self._decode_labels(rows, documents, cut, threshold)
        if labels is None:
            names, scored = [self.labels] * len(rows), self._graphs.label_scores(rows, documents)
        else:
            names = label_lists(labels, len(texts))
            scored = self._score_choices(rows, documents, names)
        answers = []
        for index, (scores, was_cut, row) in enumerate(zip(scored, cut, rows, strict=True)):
            self._graphs.check_finite(scores, index)
            answers.append(
                prediction_of(
                    names[index],
                    scores,
                    self._temperature,
                    threshold,
                    was_cut,
                    len(row),
                    len(documents.get(index, (row,))),
                )
            )
        return answers

    @property
    def classes_(self) -> np.ndarray:
        """Return the closed label set as an array (K,) of str, in the order of :meth:`predict_proba`'s columns.

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
            else "each row has its own choices"
        )
        return (
            f"The bundle {self.bundle.root} has no fixed classes, because {why}. Use predict, whose answers have "
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
        scored = self._finite_scores(rows, documents)
        found = [probabilities_of(scores, self._temperature) for scores in scored]
        return np.array(found, np.float64).reshape(len(rows), len(self.labels))

    def label_scores(self, texts: Iterable[str], *, truncate: bool | None = None) -> np.ndarray:
        """Return the raw (len(texts), K) scores of the closed label set, before temperature."""
        rows, _, documents = self._encode(check_texts(texts), "label", truncate)
        scored = self._finite_scores(rows, documents)
        return np.stack(scored) if scored else np.zeros((0, len(self.labels)), np.float32)

    def _finite_scores(self, rows: Sequence[Sequence[int]], documents: Documents) -> list[np.ndarray]:
        scored = self._graphs.label_scores(rows, documents)
        for index, scores in enumerate(scored):
            self._graphs.check_finite(scores, index)
        return scored

    def _score_choices(
        self, rows: Sequence[Sequence[int]], documents: Documents, choices: Sequence[tuple[str, ...]]
    ) -> list[np.ndarray]:
        """Return the scores of each row's own labels, in their order."""
        if "choice_scorer" not in self._sessions and self.labels:
            places = places_of(choices, self.labels)  # some of the closed set's own labels
            scored = self._graphs.label_scores(rows, documents)
            return [scores[place] for place, scores in zip(places, scored, strict=True)]
        return self._graphs.choice_scores(rows, documents, choices, self._texts.label_tokens)

    def _decode_labels(
        self, rows: Sequence[Sequence[int]], documents: Documents, cut: Sequence[bool], threshold: float
    ) -> list[Prediction]:
        decoded = self._graphs.generate(rows, documents, self.limits["max_label_tokens"] + 1)
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
        **options: Unpack[_CallOptions],
    ) -> Explanation: ...

    @overload
    def explain(
        self,
        texts: Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        **options: Unpack[_CallOptions],
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
            raise UsageError(
                f"Text {min(documents)} is over {self.limits['max_source_tokens']} tokens and read in chunks, which is "
                "decoded greedily only; leave out num_beams."
            )
        decoded = self._graphs.generate(rows, documents, limit, num_beams)
        return [
            Explanation(
                self._texts.decode(tokens), len(tokens), was_cut, tokens[-1:] == [self._eos], len(row),
                len(documents.get(i, (row,))),
            )
            for i, ((tokens, _), was_cut, row) in enumerate(zip(decoded, cut, rows, strict=True))
        ]  # fmt: skip

    # -- text -----------------------------------------------------------------------------------------

    def count_tokens(self, texts: Iterable[str], task: str = "label") -> list[int]:
        """Return the number of tokens of every text for ``task``, prefix and end-of-sequence included."""
        self._graphs.check_open()
        return self._texts.count(check_texts(texts), task)

    def tokenize(self, texts: Iterable[str], task: str = "label") -> list[list[int]]:
        """Return every text's token ids for ``task``, uncut: prefix and end-of-sequence included.

        Of a text far over the token limit only the beginning is read; it still has more ids than the limit.
        """
        self._graphs.check_open()
        return self._texts.tokenize(check_texts(texts), task)

    def _encode(
        self,
        texts: Sequence[str],
        task: str,
        truncate: bool | None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[list[int]], list[bool], Documents]:
        """Return every text's ids within the limit, whether it was cut, and the chunks of the long ones."""
        self._graphs.check_open()
        cutting = self.truncate if truncate is None else truncate
        rows, cut = self._texts.encode(texts, task, cutting, tokens)
        return rows, cut, self._texts.documents(texts, rows, task)

    # -- asyncio and life cycle -----------------------------------------------------------------------

    @overload
    async def apredict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, texts: str, labels: Labels = None, **options: Unpack[_PredictOptions]
    ) -> Prediction: ...

    @overload
    async def apredict(
        self, texts: Iterable[str], labels: Labels = None, **options: Unpack[_PredictOptions]
    ) -> list[Prediction]: ...

    async def apredict(
        self, texts: Any, labels: Labels = None, **options: Unpack[_PredictOptions]
    ) -> Prediction | list[Prediction]:
        """Run :meth:`predict` in a worker thread. The event loop stays free, because onnxruntime releases the GIL.

        Example:
            >>> answer = await student.apredict("the coil is frosted .")
        """
        import asyncio  # here, so that a script that predicts once does not wait for it

        return await asyncio.to_thread(lambda: self.predict(texts, labels, **options))

    @overload
    async def aexplain(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self,
        texts: str,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        **options: Unpack[_CallOptions],
    ) -> Explanation: ...

    @overload
    async def aexplain(
        self,
        texts: Iterable[str],
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        **options: Unpack[_CallOptions],
    ) -> list[Explanation]: ...

    async def aexplain(
        self,
        texts: Any,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        **options: Unpack[_CallOptions],
    ) -> Explanation | list[Explanation]:
        """Run :meth:`explain` in a worker thread.

        Example:
            >>> found = await student.aexplain(["the coil is frosted ."])
        """
        import asyncio

        return await asyncio.to_thread(lambda: self.explain(texts, max_new_tokens, num_beams, **options))

    def warm_up(self, tasks: Sequence[str] = ("label", "rationale")) -> None:
        """Open and run every graph of ``tasks`` once on a short input, so that the first request is not slower."""
        self._graphs.check_open()
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
            self._graphs.run_choices_once(rows[0])
        if "rationale" not in tasks and self._method != "decode":
            return
        if "explainer" in self._sessions or "decoder_step" in self._sessions:
            self.explain(text, 1, truncate=True)
        for width in self._graphs.beams:
            self.explain(text, 1, width, truncate=True)

    def close(self) -> None:
        """Release the graphs; later calls raise UsageError. ``with`` does this at the end of its block."""
        self._graphs.close()

    def __reduce__(self) -> NoReturn:
        """Refuse pickling and copying, because graphs belong to one process."""
        raise UsageError(
            "A Student cannot be pickled or copied, because its graphs belong to this process. Send the bundle's path "
            f"({str(self.bundle.root)!r}) and call Student.from_pretrained once in each process; threads can "
            "share a Student."
        )

    def __enter__(self) -> Student:
        self._graphs.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
