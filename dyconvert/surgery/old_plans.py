"""Plans of schema 1, which checkpoints of the first versions hold: their predictors read a node of an FX graph."""

from torch import nn

from dyconvert.copying import in_eval_mode, on_meta
from dyconvert.errors import PlanError, brief
from dyconvert.names import joined
from dyconvert.surgery.plan import SCHEMA, Plan
from dyconvert.surgery.trace import argument_of, graph_of


def old_prefixes(plan: Plan | None) -> dict[str, str]:
    """How the names of a predictor's tensors began when it was its block's child, and how they begin now."""
    if plan is None or not plan.is_old:
        return {}
    return {
        joined(block.name, "coefficient_predictor") + ".": joined(convs[0].name, "block_predictor") + "."
        for block in plan.blocks
        if (convs := plan.shared(block.name))
    }


def up_to_date(plan: Plan, model: nn.Module) -> Plan:
    """The plan in today's schema: each node that a predictor read as the block's argument that it stands for.

    Raises:
        PlanError: a block's node is none.
    """
    if not plan.is_old:
        return plan
    bare = in_eval_mode(on_meta(model))
    blocks = []
    for block in plan.blocks:
        convs = plan.shared(block.name)
        try:
            module = bare.get_submodule(block.name)
            graph = graph_of(module, {bare.get_submodule(conv.name) for conv in convs})
        except Exception as error:  # the forward is any code at all
            raise PlanError(
                f"Block {block.name!r} of this plan, which an older dyconvert made, can't be traced ({brief(error)}). "
                "Plan this model afresh."
            ) from error
        node = next((node for node in graph.nodes if node.name == block.reads), None)
        argument = argument_of(node) if node is not None else None
        if argument is None:
            raise PlanError(
                f"The predictor of block {block.name!r} reads {block.reads!r}, as an older dyconvert had it, which is "
                "none of the block's arguments. Plan this model afresh."
            )
        blocks.append(block.model_copy(update={"reads": argument}))
    return plan.model_copy(update={"blocks": blocks, "schema_version": SCHEMA})
