"""Which emoji the data set holds and what people call them.

One concept, one picture: of several emoji that share a name (🐱 cat face, 🐈 cat) a selection holds the one that is
recognised most easily when it is small, so that a word never asks for two different pictures.

Each line of a table is: the emoji | English nouns | Chinese nouns grouped by measure word.

- English nouns are separated by commas and take "a" or "an"; `the`, `some` or `-` (no article) before a noun overrides
  it. `the sun, sun` gives both "the sun" and "a beautiful sun".
- Chinese groups are separated by semicolons: measure words (several joined by `/`), then the nouns they count:
  `只/条 狗 小狗` is 一只狗, 一条狗, 一只小狗, 一条小狗.

The first noun of a language is the concept's name in it. Names and keywords from Unicode CLDR are added by
`annotations.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...errors import UserError
from .templates import ADJECTIVES

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Noun:
    """A noun with what stands before it: "a", "the", "some" or "" in English; 一只, 一朵, … in Chinese."""

    text: str
    determiner: str


@dataclass(frozen=True)
class Concept:
    """One emoji of the data set.

    Args:
        char: the emoji, one code point.
        category: a key of `templates.ADJECTIVES`; decides which adjectives go with the nouns.
        nouns: for each language of `LANGUAGES` at least one noun, the concept's name first.

    Raises:
        ValueError: the category is unknown, or a language has no noun.
    """

    char: str
    category: str
    nouns: dict[str, tuple[Noun, ...]]

    def __post_init__(self) -> None:
        if self.category not in ADJECTIVES:
            raise ValueError(f"category: expected one of {', '.join(ADJECTIVES)}, got {self.category!r}")
        for language in LANGUAGES:
            if not self.nouns.get(language):
                raise ValueError(f"nouns: {self.char} needs at least one noun in {language!r}, got none")

    def name(self, language: str) -> str:
        """What the picture shows, in one word or a few."""
        return self.nouns[language][0].text


def parse_table(category: str, table: str) -> Iterator[Concept]:
    """Read lines of the form described at the top of this module.

    Example:
        >>> cat, = parse_table("animal", "🐱 | cat, kitten | 只 猫 小猫")
        >>> cat.nouns["zh"][1]
        Noun(text='小猫', determiner='一只')
    """
    for line in filter(None, map(str.strip, table.splitlines())):
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != 3 or not all(fields):
            raise ValueError(f"table: expected 'emoji | English nouns | Chinese nouns', got {line!r}")
        char, english, chinese = fields
        yield Concept(char, category, {"en": tuple(_english(english)), "zh": tuple(_chinese(chinese))})


def _english(field: str) -> Iterator[Noun]:
    for entry in field.split(","):
        first, _, rest = entry.strip().partition(" ")
        if rest and first in ("the", "some", "-"):
            yield Noun(rest, first.strip("-"))
        else:
            yield Noun(entry.strip(), "a")


def _chinese(field: str) -> Iterator[Noun]:
    for group in field.split(";"):
        measures, *nouns = group.split()
        if not nouns:
            raise ValueError(f"table: expected a measure word and nouns, got {group!r}")
        for noun in nouns:
            for measure in measures.split("/"):
                yield Noun(noun, "一" + measure)


_COMMON = {
    "face": """
        😀 | smiley, smiling face, happy face, smile | 张/个 笑脸 ; 张 开心的脸 快乐的脸
        😂 | laughing face, face with tears of joy, - tears of joy | 张 大笑的脸 笑哭的脸
        😍 | face with heart eyes, heart eyes face, loving face, - heart eyes | 张 花痴脸 爱心眼的脸 ; 双 爱心眼
        😘 | kissing face, kiss, face blowing a kiss | 个 飞吻 吻 ; 张 亲亲的脸
        😎 | cool face, face with sunglasses, - sunglasses | 张 戴墨镜的脸 酷酷的脸 ; 副 墨镜 太阳镜
        😭 | crying face, sad face, face in tears | 张 哭脸 大哭的脸 伤心的脸
        😡 | angry face, mad face, furious face | 张 生气的脸 愤怒的脸 发火的脸
        😴 | sleeping face, sleepy face | 张 睡着的脸 睡觉的脸 困倦的脸
        😱 | scared face, screaming face, frightened face | 张 害怕的脸 尖叫的脸 惊恐的脸
        🤔 | thinking face, thoughtful face | 张 思考的脸 沉思的脸
        😷 | face with a mask, masked face, sick face | 张 戴口罩的脸 生病的脸
        🤢 | green face, nauseated face, disgusted face | 张 恶心的脸 想吐的脸 绿色的脸
        😇 | angel, angel face, face with a halo | 个/位 天使 小天使 ; 张 天使的脸
    """,
    "character": """
        👻 | ghost, spook | 个/只 幽灵 小幽灵 鬼 ; 个 鬼魂
        💀 | skull, human skull | 个 骷髅 骷髅头 头骨
        👽 | alien, extraterrestrial | 个 外星人 小外星人
        🤖 | robot, robot face, toy robot | 个/台 机器人 小机器人
        🤡 | clown, clown face | 个 小丑 马戏团小丑
        👶 | baby, newborn, infant | 个 宝宝 婴儿 小宝宝 小宝贝
        👸 | princess, young princess | 位/个 公主 小公主
        🎅 | - Santa Claus, - Santa, - santa claus, - Father Christmas | 位/个 圣诞老人 圣诞老公公
        ⛄ | snowman, snow man | 个 雪人 小雪人
        🎃 | pumpkin, jack-o'-lantern, jack-o-lantern, Halloween pumpkin | 个 南瓜 南瓜灯 万圣节南瓜
        💩 | pile of poo, - poop, - poo | 坨 便便 大便 粑粑
    """,
    "animal": """
        🐱 | cat, kitty, kitten, kitty cat, pussycat | 只 猫 猫咪 小猫 小猫咪 猫猫
        🐶 | dog, puppy, doggy, pup | 只/条 狗 小狗 ; 只 狗狗 狗子 小狗狗
        🐭 | mouse | 只 老鼠 小老鼠 鼠
        🐰 | rabbit, bunny, bunny rabbit | 只 兔子 小兔子 兔兔
        🦊 | fox, red fox | 只 狐狸 小狐狸
        🐻 | bear, brown bear, bear cub | 只/头 熊 ; 只 小熊 棕熊
        🐼 | panda, giant panda, panda bear | 只 熊猫 大熊猫 熊猫宝宝 ; 头 熊猫
        🐨 | koala, koala bear | 只 考拉 树袋熊 小考拉
        🐯 | tiger, tiger cub | 只/头 老虎 ; 只 小老虎 虎
        🦁 | lion, lion cub | 头/只 狮子 ; 只 小狮子 雄狮
        🐮 | cow, milk cow, calf | 头 奶牛 牛 母牛 小牛
        🐷 | pig, piggy, piglet | 头/只 猪 ; 只 小猪 猪猪
        🐸 | frog, green frog | 只 青蛙 小青蛙 蛙
        🐵 | monkey | 只 猴子 小猴子 猴
        🐔 | chicken, hen | 只 鸡 母鸡 老母鸡
        🐧 | penguin, baby penguin | 只 企鹅 小企鹅
        🐦 | bird, blue bird, birdie | 只 鸟 小鸟 鸟儿 蓝鸟
        🐤 | chick, baby chick | 只 小鸡 小黄鸡 鸡仔
        🦆 | duck, mallard, wild duck | 只 鸭子 鸭 小鸭子 野鸭
        🦉 | owl | 只 猫头鹰 小猫头鹰
        🐴 | horse, pony, brown horse | 匹 马 小马 骏马 马儿
        🦄 | unicorn | 只/匹 独角兽 小独角兽
        🐝 | bee, honeybee, bumblebee | 只 蜜蜂 小蜜蜂
        🦋 | butterfly, monarch butterfly | 只 蝴蝶 花蝴蝶 小蝴蝶
        🐌 | snail, garden snail | 只 蜗牛 小蜗牛
        🐞 | ladybug, ladybird, lady beetle | 只 瓢虫 七星瓢虫 小瓢虫
        🐢 | turtle, tortoise, green turtle | 只 乌龟 海龟 龟 小乌龟
        🐍 | snake, green snake, serpent | 条 蛇 小蛇 绿蛇
        🐙 | octopus, baby octopus | 只 章鱼 八爪鱼 小章鱼
        🦀 | crab, red crab | 只 螃蟹 小螃蟹 蟹
        🐠 | fish, tropical fish, yellow fish | 条 鱼 热带鱼 小鱼 鱼儿
        🐬 | dolphin, baby dolphin | 只/头 海豚 ; 只 小海豚
        🐳 | whale, blue whale, spouting whale | 头/只 鲸鱼 ; 头 鲸 蓝鲸 大鲸鱼
        🦈 | shark, baby shark, great white shark | 条 鲨鱼 大鲨鱼 大白鲨
        🐊 | crocodile, alligator, croc | 条/只 鳄鱼 小鳄鱼
        🐘 | elephant, baby elephant | 头 大象 象 小象 ; 只 大象
        🦒 | giraffe, baby giraffe | 只/头 长颈鹿 ; 只 小长颈鹿
        🦓 | zebra, baby zebra | 匹/只 斑马 小斑马
        🐫 | camel, two-humped camel | 头/峰 骆驼 ; 头 双峰骆驼 小骆驼
        🐑 | sheep, lamb, woolly sheep | 只 羊 绵羊 小羊 羊羔 小绵羊
        🐲 | dragon, dragon head, Chinese dragon | 条 龙 中国龙 小龙
        🦖 | dinosaur, T-Rex, t-rex, tyrannosaurus | 只/头 恐龙 霸王龙 ; 只 小恐龙
    """,
    "food": """
        🍎 | apple, red apple | 个 苹果 红苹果 ; 颗 苹果
        🍐 | pear, green pear | 个/只 梨 梨子 ; 个 鸭梨
        🍊 | orange, tangerine, mandarin orange | 个 橘子 橙子 桔子 柑橘
        🍋 | lemon, yellow lemon | 个/颗 柠檬 黄柠檬
        🍌 | banana, ripe banana | 根 香蕉 黄香蕉
        🍉 | watermelon, slice of watermelon, watermelon slice | 块/片 西瓜 ; 个 西瓜 大西瓜
        🍇 | some grapes, bunch of grapes | 串 葡萄 紫葡萄
        🍓 | strawberry, red strawberry | 颗/个 草莓 红草莓
        🍒 | some cherries, cherry, pair of cherries | 颗/串 樱桃 红樱桃 车厘子
        🍑 | peach, ripe peach | 个/颗 桃子 水蜜桃 桃
        🍍 | pineapple, ripe pineapple | 个 菠萝 凤梨 大菠萝
        🍅 | tomato, red tomato | 个 西红柿 番茄
        🍆 | eggplant, aubergine, purple eggplant | 个/根 茄子 紫茄子
        🥕 | carrot, orange carrot | 根 胡萝卜 红萝卜
        🌽 | some corn, ear of corn, corn cob, sweet corn cob | 根 玉米 玉米棒 苞米
        🍞 | some bread, loaf of bread, bread loaf | 个/片 面包 ; 片 吐司
        🧀 | some cheese, piece of cheese, cheese wedge | 块 奶酪 芝士 起司
        🍔 | hamburger, burger, cheeseburger | 个 汉堡 汉堡包
        🍟 | some french fries, some fries, box of fries | 份/包 薯条 炸薯条
        🍕 | pizza, slice of pizza, pizza slice | 块/片 披萨 比萨饼 ; 个 披萨
        🌭 | hot dog, hotdog | 个/根 热狗
        🍜 | some noodles, bowl of noodles, bowl of ramen, some ramen | 碗 面条 面 拉面 汤面
        🍦 | ice cream, ice cream cone, some ice cream | 个/支 冰淇淋 冰激凌 甜筒
        🍩 | donut, doughnut | 个 甜甜圈 巧克力甜甜圈
        🍪 | cookie, biscuit, chocolate chip cookie | 块 饼干 曲奇 曲奇饼干
        🎂 | cake, birthday cake | 个/块 蛋糕 ; 个 生日蛋糕
        🍿 | some popcorn, box of popcorn, bucket of popcorn | 桶/份 爆米花
    """,
    "drink": """
        ☕ | some coffee, cup of coffee, coffee | 杯 咖啡 热咖啡 热饮
        🍺 | some beer, beer, mug of beer, glass of beer | 杯 啤酒 ; 扎 啤酒
    """,
    "plant": """
        🍄 | mushroom, toadstool, red mushroom | 个/朵 蘑菇 红蘑菇 小蘑菇
        🌹 | rose, red rose | 朵/枝 玫瑰 ; 朵 玫瑰花 红玫瑰
        🌻 | sunflower, yellow sunflower | 朵 向日葵 太阳花 ; 株 向日葵
        🌷 | tulip, pink tulip | 朵/枝 郁金香 粉色郁金香
        🌸 | flower, cherry blossom, blossom, pink flower | 朵 花 樱花 小花 粉色的花
        🌲 | pine tree, fir tree, evergreen tree, pine | 棵 松树 杉树 常青树
        🌳 | tree, green tree, leafy tree | 棵 树 大树 绿树
        🌴 | palm tree, coconut tree | 棵 棕榈树 椰子树 椰树
        🌵 | cactus, green cactus | 棵/株 仙人掌 ; 棵 小仙人掌
        🍀 | four-leaf clover, clover, lucky clover | 株/棵 四叶草 幸运草 ; 片 四叶草
        🍁 | maple leaf, red leaf, autumn leaf | 片 枫叶 红叶 红枫叶
        🎄 | Christmas tree, christmas tree | 棵 圣诞树 小圣诞树
    """,
    "nature": """
        ☀ | the sun, sun | 个/轮 太阳 ; 轮 红日
        🌙 | the moon, moon, crescent moon, crescent | 个/轮 月亮 ; 弯 月亮 新月 月牙 ; 轮 弯月
        ⭐ | star, yellow star, gold star | 颗 星星 小星星 星 五角星
        🌈 | rainbow | 道 彩虹 七色彩虹 ; 条 彩虹
        ☁ | cloud, fluffy cloud | 朵/片 云 ; 朵 白云 ; 片 云朵
        ⚡ | - lightning, lightning bolt, thunderbolt, flash of lightning | 道 闪电 电光
        ❄ | snowflake, flake of snow | 片 雪花 雪 小雪花
        🔥 | some fire, fire, flame | 团 火 火焰 烈火 ; 把 火
        💧 | water drop, drop of water, droplet, some water | 滴 水 ; 颗 水滴 水珠
        🌊 | wave, ocean wave, water wave, the sea | 朵 浪花 ; 个 海浪 波浪 大浪 ; 片 大海
        🌍 | the Earth, the earth, globe, the world, - planet Earth | 个 地球
        🪐 | - Saturn, - saturn, planet, ringed planet, planet with a ring | 颗/个 土星 行星 ; 颗 带环的行星
        🌋 | volcano, erupting volcano | 座 火山 活火山 喷发的火山
        🏔 | mountain, snowy mountain, snow-capped mountain | 座 山 雪山 高山 大山
    """,
    "vehicle": """
        🚗 | car, red car, automobile | 辆 汽车 车 小汽车 轿车 红色汽车
        🚕 | taxi, cab, yellow taxi | 辆 出租车 的士 黄色出租车
        🚌 | bus, city bus | 辆 公交车 公共汽车 巴士 大巴
        🚒 | fire engine, fire truck, red fire truck | 辆 消防车 救火车
        🚜 | tractor, farm tractor | 辆/台 拖拉机 农用拖拉机
        🚲 | bicycle, bike, push bike | 辆 自行车 单车 脚踏车
        🚂 | train, steam train, locomotive, steam engine | 列 火车 蒸汽火车 小火车 ; 辆 火车
        ✈ | airplane, plane, aeroplane, jet plane | 架 飞机 客机 小飞机
        🚁 | helicopter, chopper | 架 直升机 直升飞机
        🚀 | rocket, space rocket, rocket ship, spaceship | 枚/支 火箭 太空火箭 ; 艘 宇宙飞船
        🛸 | UFO, ufo, flying saucer | 个/架 飞碟 不明飞行物
        ⛵ | sailboat, boat, sailing boat, yacht | 艘/条 帆船 船 小船
    """,
    "building": """
        🏠 | house, home | 座/栋 房子 小房子 ; 间 小屋 ; 个 家
        🏰 | castle, fairy-tale castle | 座 城堡 古堡 大城堡
        ⛪ | church, chapel | 座 教堂 小教堂
        🗼 | tower, the Tokyo Tower, red tower | 座 塔 东京塔 铁塔
        ⛺ | tent, camping tent | 顶/个 帐篷 小帐篷
        🎡 | ferris wheel, Ferris wheel | 座/个 摩天轮 大摩天轮
    """,
    "object": """
        ❤ | heart, red heart, love heart | 颗 心 红心 爱心 ; 个 爱心
        💎 | diamond, gem, gemstone, jewel | 颗 钻石 宝石 蓝宝石
        👑 | crown, golden crown, royal crown | 顶 皇冠 王冠 金色皇冠
        🎁 | gift, present, gift box, wrapped gift | 份/个 礼物 ; 个 礼盒 礼物盒 ; 份 礼品
        🎈 | balloon, red balloon | 个/只 气球 红气球
        ⚽ | football, soccer ball | 个 足球 英式足球
        🏀 | basketball, orange basketball | 个 篮球 橙色篮球
        🎸 | guitar, electric guitar | 把 吉他 电吉他
        📷 | camera, photo camera | 台/部 相机 照相机
        📱 | phone, mobile phone, cell phone, smartphone | 部/台 手机 智能手机 ; 部 电话
        💻 | laptop, computer, notebook computer | 台 电脑 笔记本电脑
        ⏰ | alarm clock, clock, red alarm clock | 个 闹钟 小闹钟 钟
        💡 | light bulb, bulb, light | 个 灯泡 电灯泡 ; 盏 灯
        🔑 | key, golden key | 把 钥匙 金钥匙
        🔔 | bell, golden bell | 个 铃铛 金铃铛 铃
        ✂ | - scissors, pair of scissors, some scissors | 把 剪刀 剪子
        ✏ | pencil, yellow pencil | 支 铅笔 笔 黄铅笔
        📚 | some books, stack of books, pile of books | 摞/叠 书 书本 书籍
        🎩 | top hat, hat, black hat, magician's hat | 顶 礼帽 帽子 高帽 黑帽子
        👓 | - glasses, pair of glasses, - eyeglasses | 副 眼镜
        🏆 | trophy, trophy cup, golden cup, gold trophy | 座/个 奖杯 金奖杯
        ☂ | umbrella, purple umbrella | 把 雨伞 伞 紫色雨伞
        👍 | thumbs up, thumb, thumbs-up sign | 个 大拇指 赞 ; 只 竖起拇指的手
    """,
}

SELECTIONS: dict[str, tuple[Concept, ...]] = {
    "common": tuple(concept for category, table in _COMMON.items() for concept in parse_table(category, table)),
}


def resolve_selection(selection: str | Sequence[Concept]) -> tuple[Concept, ...]:
    """A selection by its name, or the concepts given."""
    if not isinstance(selection, str):
        return tuple(selection)
    if selection not in SELECTIONS:
        raise UserError(f"selection: no set is called {selection!r}; there are: {', '.join(SELECTIONS)}")
    return SELECTIONS[selection]
