"""The app of the Space: computes the scores of predictions and references given as JSON."""

import json

import evaluate
import gradio

METRIC = evaluate.load("cozyrag_qa.py")


def compute(predictions: str, references: str) -> dict:
    """Scores of two JSON lists of equal length. Raises gradio.Error if they are invalid."""
    try:
        return METRIC.compute(predictions=json.loads(predictions), references=json.loads(references))
    except ValueError as error:  # invalid JSON, or inputs that the metric refuses
        raise gradio.Error(str(error)) from error


gradio.Interface(
    fn=compute,
    inputs=[
        gradio.Textbox(label="predictions (JSON list)", lines=6),
        gradio.Textbox(label="references (JSON list)", lines=6),
    ],
    outputs=gradio.JSON(label="scores, in percent"),
    title="cozyrag_qa",
    description=METRIC.info.description,
    article=METRIC.info.inputs_description,
).launch()
