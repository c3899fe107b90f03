"""Which rank holds which part of which table: TorchRec's planner, one optimizer fused into the tables, and a
start that does not depend on the plan."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrank.data.torch_batch import lookup_keys
from torchrank.features.schema import FeatureSchema, TableSpec
from torchrank.training.config import ShardingChoice, ShardingConfig, TableOptimizerConfig
from torchrank.training.embeddings import module_name, table_of

# The torch optimizers whose rule TorchRec fuses into the tables' backward pass, CPU kernels included.
TABLE_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}


def replicated_tables(schema: FeatureSchema, sharding: ShardingConfig) -> set[str]:
    """The unpooled tables that are to be data-parallel: `Embeddings` keeps those out of TorchRec's hands."""
    _, unpooled = lookup_keys(schema)
    names = {key.table for key in unpooled}
    return {
        table.name
        for table in schema.tables
        if table.name in names and _choice(sharding, table) == ShardingChoice.data_parallel
    }


def _choice(sharding: ShardingConfig, table: TableSpec) -> ShardingChoice:
    """Fbgemm's kernels take rows of 4, 8, 12 … floats; any other table is an ordinary parameter on every rank."""
    choice = sharding.tables.get(table.name, sharding.default)
    if table.dim % 4 == 0 or choice == ShardingChoice.data_parallel:
        return choice
    if choice == ShardingChoice.auto:
        return ShardingChoice.data_parallel
    raise ValueError(
        f"table {table.name!r} has dim {table.dim}; {choice.value} sharding takes multiples of 4, other dims are "
        f'data_parallel: "+sharding.tables={{{table.name}: data_parallel}}"'
    )


class _BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec offers no row-wise bags on CPU; its kernels run them there all the same."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        row_wise = ShardingType.ROW_WISE.value
        return types if row_wise in types else [*types, row_wise]


class _UnpooledSharder(EmbeddingCollectionSharder):
    """Data-parallel tables are not among its choices: see `replicated_tables`."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [kind for kind in types if kind != ShardingType.DATA_PARALLEL.value]


def shard(
    module: nn.Module,
    schema: FeatureSchema,
    sharding: ShardingConfig,
    optimizer: TableOptimizerConfig,
    device: torch.device,
    seed: int,
) -> DistributedModelParallel:
    """Plans, gives every table that is not data-parallel its fused optimizer, shards, fills the tables.

    `module` holds the embedding collections on the meta device and everything else on any device. Raises ValueError
    where no plan exists for what `sharding` demands.
    """
    sharders: list[Any] = [_BagSharder(), _UnpooledSharder()]
    # TorchRec would plan for devices of 32 GiB.
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type, hbm_cap=memory)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=_constraints(schema, sharding))
    try:
        plan = planner.collective_plan(module, sharders, dist.GroupMember.WORLD)
    except PlannerError as error:
        raise ValueError(
            f"no sharding plan for {sharding.default!r} (tables: {dict(sharding.tables)}): {error}"
        ) from error
    _fuse(module, plan, optimizer)
    sharded = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)
    _fill_tables(sharded, seed)
    return sharded


def table_optimizer_arguments(config: TableOptimizerConfig) -> dict[str, float]:
    return {"lr": config.lr} if config.name == "sgd" else {"lr": config.lr, "eps": config.eps}


def _constraints(schema: FeatureSchema, sharding: ShardingConfig) -> dict[str, ParameterConstraints]:
    names = {table.name for table in schema.tables}
    unknown = sorted(set(sharding.tables) - names)
    if unknown:
        raise ValueError(f"sharding.tables names {unknown[0]!r}; the tables are: {', '.join(sorted(names))}")
    constraints = {}
    for table in schema.tables:
        choice = _choice(sharding, table)
        # TorchRec splits columns at 128 by default, wider than most tables here. Fbgemm wants multiples of 4.
        columns = max(4, math.ceil(table.dim / dist.get_world_size() / 4) * 4)
        constraints[module_name(table.name)] = ParameterConstraints(
            sharding_types=None if choice == ShardingChoice.auto else [choice.value],
            min_partition=columns if table.dim % columns == 0 else None,
        )
    return constraints


def _fuse(module: nn.Module, plan: ShardingPlan, optimizer: TableOptimizerConfig) -> None:
    """A data-parallel table is an ordinary parameter: the trainer gives it a torch optimizer of the same rule."""
    for path, parameters in plan.plan.items():
        collection = module.get_submodule(path)
        for key, parameter in collection.named_parameters():
            table = key.split(".")[1]  # embedding_bags.TABLE.weight, embeddings.TABLE.weight
            if parameters[table].sharding_type != ShardingType.DATA_PARALLEL.value:
                apply_optimizer_in_backward(
                    TABLE_OPTIMIZERS[optimizer.name], [parameter], table_optimizer_arguments(optimizer)
                )


def describe(sharded: DistributedModelParallel) -> list[dict[str, Any]]:
    """One entry per table: how it is sharded, by which kernel, and the rows and columns each rank holds."""
    tables = [
        {
            "table": table_name(key),
            "collection": "embeddings.replicated",
            "sharding": ShardingType.DATA_PARALLEL.value,
            "kernel": "torch",
            "ranks": list(range(dist.get_world_size())),
            "shards": [],
        }
        for key in table_parameters(sharded)
        if "embeddings.replicated." in key
    ]
    for collection, parameters in sharded.plan.plan.items():
        for table, parameter in parameters.items():
            shards = parameter.sharding_spec.shards if parameter.sharding_spec is not None else []
            tables.append(
                {
                    "table": table_of(table),
                    "collection": collection,
                    "sharding": parameter.sharding_type,
                    "kernel": parameter.compute_kernel,
                    "ranks": list(parameter.ranks or []),
                    "shards": [
                        {"rank": s.placement.rank(), "offset": list(s.shard_offsets), "size": list(s.shard_sizes)}
                        for s in shards
                    ],
                }
            )
    return sorted(tables, key=lambda entry: str(entry["table"]))


# Where `RankingModule` keeps its tables.
_TABLE_KEY = re.compile(
    r"(?:^|\.)embeddings\.(?:pooled\.embedding_bags|(?:unpooled|replicated)\.dim\d+\.embeddings)\.([^.]+)\.weight$"
)


def table_name(key: str) -> str | None:
    """`embeddings.pooled.embedding_bags.table/TABLE.weight` -> `TABLE`; None for the key of a dense parameter."""
    match = _TABLE_KEY.search(key)
    return table_of(match.group(1)) if match else None


def table_parameters(sharded: nn.Module) -> dict[str, Tensor | ShardedTensor]:
    """State-dict key -> weights, for every embedding table however it is sharded."""
    return {key: value for key, value in sharded.state_dict().items() if table_name(key) is not None}


_CHUNK_ROWS = 4096


def _fill_tables(sharded: nn.Module, seed: int) -> None:
    """Uniform in ±1/sqrt(dim)/8: a value depends on seed, table, row and column, never on the plan."""
    with torch.no_grad():
        for key, value in table_parameters(sharded).items():
            name = table_name(key)
            assert name is not None
            if isinstance(value, ShardedTensor):
                columns = value.size(1)
                for shard in value.local_shards():
                    row, column = shard.metadata.shard_offsets
                    _fill(shard.tensor, name, seed, columns, row, column)
            else:
                _fill(value, name, seed, value.shape[1], 0, 0)


def _fill(target: Tensor, table: str, seed: int, columns: int, first_row: int, first_column: int) -> None:
    """Chunks of rows have generators of their own, so that a shard makes only the chunks it touches."""
    bound = 1 / (8 * math.sqrt(columns))
    key = np.array([seed, zlib.crc32(table.encode())], np.uint64)
    rows, width = target.shape
    for chunk in range(first_row // _CHUNK_ROWS, -(-(first_row + rows) // _CHUNK_ROWS)):
        generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, chunk], np.uint64)))
        values = generator.random((_CHUNK_ROWS, columns), np.float32) * np.float32(2 * bound) - np.float32(bound)
        start, stop = max(first_row, chunk * _CHUNK_ROWS), min(first_row + rows, (chunk + 1) * _CHUNK_ROWS)
        part = values[start - chunk * _CHUNK_ROWS : stop - chunk * _CHUNK_ROWS, first_column : first_column + width]
        target[start - first_row : stop - first_row] = torch.from_numpy(part).to(target.device)
