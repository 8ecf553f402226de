"""Numbers, sizes and times as people read them."""

import pytest

from redisgate import units


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.bytes_text(None), units.NOTHING),
        (units.bytes_text(512), "512 B"),
        (units.bytes_text(1536), "1.5 KiB"),
        (units.bytes_text(5 << 30), "5 GiB"),
        (units.bytes_text(3 << 50), "3072 TiB"),
        (units.bytes_rate_text(1536), "1.5 KiB/s"),
        (units.number_text(None), units.NOTHING),
        (units.number_text(1234), "1,234"),
        (units.number_text(1234.56, 1), "1,234.6"),
        (units.short_number(0), "0"),
        (units.short_number(12.5), "12.5"),
        (units.short_number(1234), "1,234"),
        (units.short_number(12345), "12.3k"),
        (units.short_number(2.5e6), "2.5M"),
        (units.short_number(3e9), "3G"),
        (units.rate_text(12.345), "12.3/s"),
        (units.rate_text(1234.5), "1,234/s"),
        (units.percent_text(99.5), "99.5 %"),
        (units.milliseconds_text(None), units.NOTHING),
        (units.milliseconds_text(1.234), "1.23 ms"),
        (units.microseconds_text(None), units.NOTHING),
        (units.microseconds_text(12.4), "12 µs"),
        (units.microseconds_text(2500), "2.5 ms"),
        (units.microseconds_text(3e6), "3.0 s"),
        (units.span_text(59), "59 s"),
        (units.span_text(90), "1.5 min"),
        (units.span_text(86400 * 2), "2.0 d"),
        (units.duration_text(None), ""),
        (units.duration_text(1500), "1.5 s"),
        (units.duration_text(65_000), "1 min 5 s"),
        (units.duration_text(3_600_000), "1 h 0 min"),
        (units.duration_text(90_061_000), "1 d 1 h"),
    ],
)
def test_figures_are_shown_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected
