"""Chinese sentences about ten cities; the answer is the city's name alone.

Two thirds name the city (我爱北京天安门 → 北京), one third only a sight of it (天安门值得一去 → 北京). A sentence
is a template filled with a sight; the test has sentences that training does not, and sights that training
never pairs with their template. The sights of `_NEW` never occur in training at all: there only the named
city can be read off.
"""

import random
from pathlib import Path

from manylora.lifecycle.recipes.recipe import Row, Splits

SIGHTS: dict[str, tuple[str, ...]] = {
    "北京": ("天安门", "故宫", "颐和园", "长城", "鸟巢", "天坛", "王府井", "后海"),
    "上海": ("东方明珠", "外滩", "豫园", "南京路", "城隍庙", "陆家嘴", "田子坊", "新天地"),
    "广州": ("小蛮腰", "陈家祠", "沙面", "白云山", "越秀公园", "长隆", "上下九", "珠江夜游"),
    "深圳": ("世界之窗", "大梅沙", "莲花山", "欢乐谷", "华强北", "东部华侨城", "平安大厦", "深圳湾"),
    "成都": ("宽窄巷子", "锦里", "武侯祠", "杜甫草堂", "大熊猫基地", "春熙路", "青城山", "都江堰"),
    "杭州": ("西湖", "灵隐寺", "雷峰塔", "断桥", "西溪湿地", "宋城", "龙井村", "钱塘江"),
    "西安": ("兵马俑", "大雁塔", "钟楼", "华清池", "回民街", "古城墙", "大唐不夜城", "碑林"),
    "南京": ("夫子庙", "中山陵", "明孝陵", "玄武湖", "总统府", "秦淮河", "鸡鸣寺", "栖霞山"),
    "武汉": ("黄鹤楼", "东湖", "户部巷", "江汉路", "长江大桥", "归元寺", "光谷", "昙华林"),
    "重庆": ("洪崖洞", "解放碑", "朝天门", "磁器口", "长江索道", "武隆天坑", "大足石刻", "李子坝"),
}
_NEW: dict[str, tuple[str, ...]] = {
    "北京": ("国家博物馆", "香山"), "上海": ("科技馆", "迪士尼"), "广州": ("石室教堂", "动物园"),
    "深圳": ("野生动物园", "海上世界"), "成都": ("文殊院", "太古里"), "杭州": ("河坊街", "植物园"),
    "西安": ("历史博物馆", "小雁塔"), "南京": ("博物院", "老门东"), "武汉": ("欢乐谷", "植物园"),
    "重庆": ("南山", "科技馆"),
}  # fmt: skip
_NAMED = (
    "我爱{c}{s}", "我想去{c}看{s}", "{c}的{s}真美", "昨天我们参观了{c}{s}", "周末一起去{c}{s}吧", "{c}{s}的人太多了",
    "他在{c}{s}拍了很多照片", "第一次到{c}，先去了{s}", "听说{c}{s}很有名", "从{c}{s}出来已经天黑了",
)  # fmt: skip
_UNNAMED = ("我想去{s}", "{s}值得一去", "昨天我们参观了{s}", "{s}的门票多少钱", "他在{s}拍了很多照片", "{s}真漂亮")


def make(seed: int, source: Path | None = None) -> Splits:
    """About 650 sentences to learn from, 60 to choose by, 200 for the score, 20 of them with unseen sights."""
    random_ = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for city, sights in SIGHTS.items():
        for sight in sights:
            named = random_.sample(_NAMED, 7)
            unnamed = random_.sample(_UNNAMED, 4)
            train += [_row(t, city, sight) for t in named[:5] + unnamed[:3]]
            held_out += [_row(t, city, sight) for t in named[5:] + unnamed[3:]]
    random_.shuffle(train)
    random_.shuffle(held_out)
    new = [_row(random_.choice(_NAMED), city, sight) for city, sights in _NEW.items() for sight in sights]
    for row in (_row("我爱{c}{s}", "北京", "天安门"), _row("我爱{c}{s}", "上海", "东方明珠")):
        held_out = [r for r in held_out if r != row]
        train = [r for r in train if r != row]
        new.append(row)
    return Splits(train, held_out[:60], [*new, *held_out[60:]])


def _row(template: str, city: str, sight: str) -> Row:
    return {"text": template.format(c=city, s=sight), "label": city}
