"""Recurrent cells and sequences: vanilla RNN, LSTM and GRU."""

from __future__ import annotations

from ...reference.recurrent import extra_names as extra_names
from .cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from .sequences import gru, lstm, rnn

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_relu_cell", "rnn_tanh_cell"]
