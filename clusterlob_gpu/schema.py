"""Tables of the lake and of a run: name, type, unit and meaning of every column.

Times are int64 microseconds since the epoch, UTC.  Prices and sizes in the lake are integers:
price = price_int * price_increment and qty = qty_int * amount_increment of the `dim_symbol` row
that is valid at the event's time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

US_PER_SECOND = 1_000_000
US_PER_DAY = 86_400 * US_PER_SECOND

SIDE_BUY, SIDE_SELL, SIDE_UNKNOWN = 0, 1, 2
"""Codes of `trades.side`: the side of the taker."""

BOOK_LEVELS = 25


def _field(name: str, kind: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


def _table(*fields: pa.Field) -> pa.Schema:
    return pa.schema(fields)


_LEVELS = pa.list_(pa.int64())
_TS_LOCAL = _field("ts_local_us", pa.int64(), "time of receipt, the clock of the lake")
_TS_EXCH = _field("ts_exch_us", pa.int64(), "time given by the exchange")
_SYMBOL_ID = _field("symbol_id", pa.int64(), "key of dim_symbol")
_FILE_ID = _field("file_id", pa.int32(), "source file, see the manifest")
_LINE = _field("file_line_number", pa.int32(), "line of the source file; the header is line 1")

TRADES = _table(
    _TS_LOCAL,
    _TS_EXCH,
    _SYMBOL_ID,
    _field("exchange_id", pa.int16(), "number of the exchange"),
    _field("trade_id", pa.string(), "the exchange's id, empty where it gives none"),
    _field("side", pa.uint8(), "the taker's side: 0 buy, 1 sell, 2 unknown"),
    _field("price_int", pa.int64(), "price in price increments"),
    _field("qty_int", pa.int64(), "quantity in amount increments"),
    _FILE_ID,
    _LINE,
)
BOOK_SNAPSHOT_25 = _table(
    _TS_LOCAL,
    _TS_EXCH,
    _SYMBOL_ID,
    _field("bids_px", _LEVELS, "bid prices, best first, null where a level is missing"),
    _field("bids_sz", _LEVELS, "bid sizes"),
    _field("asks_px", _LEVELS, "ask prices, best first, null where a level is missing"),
    _field("asks_sz", _LEVELS, "ask sizes"),
    _FILE_ID,
    _LINE,
)
QUOTES = _table(
    _TS_LOCAL,
    _TS_EXCH,
    _SYMBOL_ID,
    _field("bid_px_int", pa.int64(), "best bid, price increments", nullable=True),
    _field("bid_sz_int", pa.int64(), "size at the best bid", nullable=True),
    _field("ask_px_int", pa.int64(), "best ask, price increments", nullable=True),
    _field("ask_sz_int", pa.int64(), "size at the best ask", nullable=True),
    _FILE_ID,
    _LINE,
)
DERIVATIVE_TICKER = _table(
    _TS_LOCAL,
    _TS_EXCH,
    _SYMBOL_ID,
    _field("mark_px", pa.float64(), "mark price", nullable=True),
    _field("index_px", pa.float64(), "index price", nullable=True),
    _field("last_px", pa.float64(), "last trade price", nullable=True),
    _field("funding_rate", pa.float64(), "rate of the running funding period", nullable=True),
    _field("predicted_funding_rate", pa.float64(), "rate of the next period", nullable=True),
    _field("funding_ts_us", pa.int64(), "time of the next funding", nullable=True),
    _field("open_interest", pa.float64(), "open interest, base units", nullable=True),
    _FILE_ID,
    _LINE,
)
LIQUIDATIONS = _table(
    _TS_LOCAL,
    _TS_EXCH,
    _SYMBOL_ID,
    _field("liq_id", pa.string(), "the exchange's id, empty where it gives none"),
    _field("side", pa.uint8(), "side of the forced order: 1 sell closes a long"),
    _field("price_int", pa.int64(), "price in price increments"),
    _field("qty_int", pa.int64(), "quantity in amount increments"),
    _FILE_ID,
    _LINE,
)
TRUTH = _table(
    _TS_LOCAL,
    _SYMBOL_ID,
    _field("trade_type", pa.uint8(), "planted type: 0 passive, 1 opportunistic, 2 directional"),
    _FILE_ID,
    _LINE,
)
DIM_SYMBOL = _table(
    _SYMBOL_ID,
    _field("exchange_id", pa.int16(), "number of the exchange"),
    _field("exchange", pa.string(), "name of the exchange, as in the partitions"),
    _field("exchange_symbol", pa.string(), "the exchange's name of the instrument"),
    _field("base_asset", pa.string(), "empty where unknown", nullable=True),
    _field("quote_asset", pa.string(), "empty where unknown", nullable=True),
    _field("tick_size", pa.float64(), "smallest price step, quote units"),
    _field("lot_size", pa.float64(), "smallest quantity step, base units"),
    _field("price_increment", pa.float64(), "quote units per price_int"),
    _field("amount_increment", pa.float64(), "base units per qty_int"),
    _field("contract_size", pa.float64(), "base units per contract"),
    _field("valid_from_ts", pa.int64(), "first time at which the row holds"),
    _field("valid_until_ts", pa.int64(), "first time at which it no longer holds"),
)
LAKE_TABLES: dict[str, pa.Schema] = {
    "trades": TRADES,
    "book_snapshot_25": BOOK_SNAPSHOT_25,
    "quotes": QUOTES,
    "derivative_ticker": DERIVATIVE_TICKER,
    "liquidations": LIQUIDATIONS,
    "truth": TRUTH,
}
"""Day-partitioned tables: `<lake>/<table>/exchange=<exchange>/date=YYYY-MM-DD/*.parquet`."""

EXCHANGE_IDS = {
    "binance": 1,
    "binance-futures": 2,
    "bitstamp": 10,
    "binance-coin-futures": 20,
    "us-equity": 100,
}
"""Known exchanges; any other name gets a number above 1000 from its hash."""

MAX_TS = 2**63 - 1

ALL_CLUSTERS = -1
"""Number that stands for all clusters together in tables by cluster."""

NO_ID = -1
"""A trade id that is not a number."""

FEATURES = ("v_rel", "sbs", "obs", "spread", "t_m", "t_age")
Z_FEATURES = tuple(f"z_{name}" for name in FEATURES)

FACTORS = (
    "flow_imbalance_large",
    "flow_imbalance_small",
    "flow_imbalance_total",
    "flow_share_large",
    "large_net_share",
    "large_small_disagreement",
    "flow_toxicity",
    "top1_share",
    "top3_share",
    "top5_share",
)
"""What taker-flow bars say of their flow."""
ROLL_UPS = (1800 * US_PER_SECOND, 3600 * US_PER_SECOND, 10_800 * US_PER_SECOND)
"""Times over which factors are summed: 30 min, 1 h, 3 h."""


@dataclass(frozen=True)
class Trades:
    """One day of trades of a symbol, in the lake's order; times in us, values in common units."""

    ts: np.ndarray
    side: np.ndarray
    price: np.ndarray
    qty: np.ndarray


@dataclass(frozen=True)
class Fills:
    """One day of trades with what tells the fills of one order."""

    trades: Trades
    ts_exch: np.ndarray
    trade_id: np.ndarray
    """int64, NO_ID where the id is not a number."""


@dataclass(frozen=True)
class BookRows:
    """One day of book rows of a symbol, valid or not, reduced to the touch and the depth.

    bid, ask, bid_sz, ask_sz are `kernels.NO_LEVEL` where the side is empty; bid_depth and ask_depth
    are sums of the first levels; tick is the tick size in price units.
    """

    ts: np.ndarray
    bid: np.ndarray
    ask: np.ndarray
    bid_sz: np.ndarray
    ask_sz: np.ndarray
    bid_depth: np.ndarray
    ask_depth: np.ndarray
    tick: np.ndarray


@dataclass(frozen=True)
class Context:
    """Columns of the book rows that a day's trades may meet, carry included; one entry per row."""

    ts: np.ndarray
    mid2: np.ndarray
    """bid + ask, twice the mid, integer price units."""
    touch_qty: np.ndarray
    """bid_sz1 + ask_sz1, integer size units."""
    log_bid: np.ndarray
    """ln(1 + bid depth in base units)."""
    log_ask: np.ndarray
    spread: np.ndarray
    """ask1 - bid1 in ticks, or 1e4 (ask1 - bid1) / mid."""
    mid_change: np.ndarray
    bid_change: np.ndarray
    ask_change: np.ndarray

    @property
    def changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times (us) of the last changes of mid, bid and ask."""
        return self.mid_change, self.bid_change, self.ask_change
