"""A run in a notebook: live curves in one output that is drawn again, and the result as HTML.

Plain HTML and SVG, so that Jupyter, Colab and VS Code show it without an extension. IPython is used only where it is
loaded already.
"""

from lowrank_tune.ui.notebook.kernel import in_notebook
from lowrank_tune.ui.notebook.result import result_html
from lowrank_tune.ui.notebook.view import NotebookView

__all__ = ["NotebookView", "in_notebook", "result_html"]
