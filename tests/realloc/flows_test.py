"""A reallocation as a table and as a picture."""

import collections
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from realjax.models.parameters import abstract_parameters
from realjax.parallel import Allocation
from realjax.realloc.flows import (
    COLORS,
    RELAY_COLOR,
    Flow,
    bytes_text,
    flows,
    flows_svg,
    flows_text,
)
from realjax.realloc.hops import ACROSS, WITHIN
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import Layout, leaf_classes
from realjax.realloc.routes import route
from realjax.testing import tiny_model

SVG = "{http://www.w3.org/2000/svg}"


def flows_of(source, destination, hosts=None):
    pair = Allocation.parse(source), Allocation.parse(destination)
    return flows(leaf_classes(abstract_parameters(tiny_model()), *pair), "int8", hosts)


def test_the_table_has_a_line_a_class():
    # Rows of 4 in 2 parts on 0, 1; in 4 on 2 to 5; two leaves of 16 bytes.
    before = Layout(devices=(0, 1), mesh_shape=(2,), spec=((0,),))
    after = Layout(devices=(1, 2, 3, 4), mesh_shape=(4,), spec=((0,),))
    found = route(before, after, (4, 4), np.int8, Hosts.uniform(2))
    # 0 sends rows 0 and 1 to 1 and 2; 1 sends rows 2 and 3 to 3 and 4.
    text = flows_text([Flow(names=("gate", "up"), route=found)])
    assert text.splitlines() == [
        "leaves   shape  kind   pieces  on device  across hosts  within host"
        "  busiest link",
        "gate +1  4×4    slice       4        0 B          24 B          8 B"
        "       0→1 4 B",
        "sum                                  0 B          24 B          8 B",
    ]


def test_links_of_a_jitted_identity_are_the_compilers():
    lines = flows_text(flows_of("f4", "t4")).splitlines()
    assert any(" jit " in line for line in lines)
    assert all(line.endswith(" -") for line in lines if " jit " in line)


def test_bytes_are_written_in_a_unit_with_a_whole_part():
    sizes = (0, 1023, 1024, 3 << 19, 1 << 40)
    texts = ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "1.0 TiB"]
    assert [bytes_text(size) for size in sizes] == texts


def lines_of(svg):
    """Stroke, width and title of every line of a picture."""
    return [
        (path.attrib["stroke"], float(path.attrib["stroke-width"]), path[0].text or "")
        for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
    ]


def test_a_picture_has_a_line_a_link_as_wide_as_its_bytes():
    moving = flows_of("f4t2", "t4@4-7", Hosts.uniform(4))
    expected = collections.Counter()
    for flow in moving:
        for giver, taker, size in zip(*flow.route.link_bytes("across"), strict=True):
            expected[giver, taker] += len(flow.names) * size
    found = [line for line in lines_of(flows_svg(moving)) if line[0] == COLORS[ACROSS]]
    titles = {f"{a} → {b}: {bytes_text(int(n))}" for (a, b), n in expected.items()}
    assert expected and {title for *_, title in found} == titles
    widths = {title.partition(":")[0]: width for _, width, title in found}
    (thick, most), *_, (thin, least) = expected.most_common()
    if least < most:
        ratio = widths["{} → {}".format(*thin)] / widths["{} → {}".format(*thick)]
        assert ratio == pytest.approx(least / most, rel=0.1, abs=0.1)


def test_relays_and_hosts_show():
    moving = flows_of("t2", "d4@4-7", Hosts.uniform(4))
    svg = flows_svg(moving, "t2 → d4")
    colors = collections.Counter(color for color, *_ in lines_of(svg))
    # Both devices send to one of the four at least, and that relays to three others.
    assert colors[RELAY_COLOR] >= 3 and colors[COLORS[ACROSS]] >= 2
    assert not colors[COLORS[WITHIN]]
    words = re.findall(r">([^<>]+)</text>", svg)
    assert {"t2 → d4", "host 0", "host 1", "device 7"} <= set(words)


def test_many_devices_are_drawn_by_host():
    before = Layout(devices=tuple(range(128)), mesh_shape=(128,), spec=((0,),))
    after = Layout(devices=tuple(range(128)), mesh_shape=(128,))
    found = route(before, after, (128,), np.int8, Hosts.uniform(32))
    svg = flows_svg([Flow(names=("all",), route=found)])
    assert "host 3<" in svg and "device" not in svg.replace("on device", "")
    # Four hosts, each to the others, and within: on device and within host.
    assert len(lines_of(svg)) == 4 * 3 + 4 * 2 + 4


def test_what_is_too_much_to_draw_is_refused():
    before = Layout(devices=tuple(range(128)), mesh_shape=(128,), spec=((0,),))
    after = Layout(devices=tuple(range(128)), mesh_shape=(128,))
    found = route(before, after, (128,), np.int8, Hosts.uniform(1))
    with pytest.raises(ValueError, match="between 128 and 128 hosts"):
        flows_svg([Flow(names=("all",), route=found)])
    with pytest.raises(ValueError, match="no leaf to draw"):
        flows_svg([])
