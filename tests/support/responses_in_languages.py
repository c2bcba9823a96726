"""Responses of good quality in several languages, composed of sampled sentences: 100 distinct ones per language."""

from __future__ import annotations

import random

SENTENCES = {
    "en": (
        "This function opens the file and returns a list with all of its lines.",
        "If the file cannot be found, it raises an error that names the path.",
        "You can pass a second argument to set the encoding of the text.",
        "The default is the one that the system of the user prefers.",
        "Close the file when you have read what you need from it.",
        "A large file should be read line by line, so that memory is saved.",
        "Blank lines are kept, and the caller decides what to do with them.",
        "The order of the results is that of the lines on the disk.",
        "Nothing is written to the disk while the function is running.",
        "Several programs may read the same file at the same time.",
    ),
    "de": (
        "Diese Funktion öffnet die Datei und gibt eine Liste mit allen Zeilen zurück.",
        "Wenn die Datei nicht gefunden wird, meldet sie einen Fehler mit dem Pfad.",
        "Das zweite Argument legt die Zeichenkodierung des Textes fest.",
        "Die Voreinstellung ist die, welche das Betriebssystem des Benutzers bevorzugt.",
        "Schließen Sie die Datei, sobald Sie alles Nötige gelesen haben.",
        "Große Dateien werden am besten zeilenweise gelesen, um Speicherplatz zu sparen.",
        "Leere Zeilen bleiben erhalten, und der Aufrufer entscheidet darüber.",
        "Die Reihenfolge der Ergebnisse ist dieselbe wie auf der Festplatte.",
        "Während der Ausführung wird nichts auf die Festplatte geschrieben.",
        "Mehrere Programme können gleichzeitig mit derselben Datei arbeiten.",
    ),
    "zh": (
        "这个函数打开文件，并返回包含所有行的列表。",
        "如果找不到文件，它会抛出一个带有路径的错误。",
        "第二个参数可以用来指定文本的编码方式。",
        "默认值取决于用户所使用的操作系统。",
        "读完需要的内容以后，请记得关闭文件。",
        "对于很大的文件，最好逐行读取，这样可以节省内存。",
        "空行会被保留下来，由调用者决定怎样处理。",
        "结果的顺序与磁盘上各行的顺序完全一致。",
        "在运行过程中，不会向磁盘写入任何数据。",
        "多个程序可以同时读取同一个文件，互不影响。",
    ),
    "ja": (
        "この関数はファイルを開き、すべての行のリストを返します。",
        "ファイルが見つからない場合は、パスを含むエラーが発生します。",
        "二番目の引数で文字コードを指定することができます。",
        "既定値は利用者のシステムによって決まります。",
        "必要な内容を読み終えたら、忘れずに閉じてください。",
        "大きなデータは一行ずつ処理すると、メモリーを節約できます。",
        "空の行もそのまま残り、扱い方は呼び出す側に任されます。",
        "結果の順序はディスク上の並びと同じになります。",
        "実行中に何かが書き込まれることはありません。",
        "複数のプログラムから同時に利用しても問題ありません。",
    ),
    "ko": (
        "이 함수는 파일을 열고 모든 줄이 담긴 목록을 돌려줍니다.",
        "파일을 찾을 수 없으면 경로가 적힌 오류가 발생합니다.",
        "두 번째 인자로 글자의 부호화 방식을 정할 수 있습니다.",
        "기본값은 사용자의 운영 체제가 쓰는 방식과 같습니다.",
        "필요한 내용을 다 읽은 뒤에는 반드시 닫아야 합니다.",
        "큰 자료는 한 줄씩 읽어야 메모리를 아낄 수 있습니다.",
        "빈 줄도 그대로 남으며 처리 방법은 호출한 쪽이 정합니다.",
        "결과의 순서는 디스크에 적힌 순서와 똑같습니다.",
        "실행하는 동안 디스크에는 아무것도 쓰지 않습니다.",
        "여러 프로그램이 같은 자료를 동시에 읽을 수 있습니다.",
    ),
    "hi": (
        "यह फ़ंक्शन फ़ाइल को खोलता है और सभी पंक्तियों की सूची लौटाता है।",
        "अगर फ़ाइल नहीं मिलती है, तो यह पथ के साथ एक त्रुटि देता है।",
        "दूसरे तर्क से आप पाठ की एन्कोडिंग चुन सकते हैं।",
        "डिफ़ॉल्ट मान वही है जो उपयोगकर्ता के सिस्टम में होता है।",
        "ज़रूरी जानकारी पढ़ने के बाद इसे बंद करना न भूलें।",
        "बड़ी फ़ाइल को एक-एक पंक्ति करके पढ़ें, ताकि मेमोरी की बचत हो।",
        "ख़ाली पंक्तियाँ भी बनी रहती हैं और उनका निर्णय आप पर है।",
        "परिणाम का क्रम डिस्क पर लिखे क्रम के समान रहता है।",
        "चलते समय यह डिस्क पर कुछ भी नहीं लिखता।",
        "कई प्रोग्राम एक ही समय में इसका उपयोग कर सकते हैं।",
    ),
    "th": (
        "ฟังก์ชันนี้เปิดไฟล์และคืนค่ารายการของทุกบรรทัด",
        "ถ้าไม่พบไฟล์ ระบบจะแจ้งข้อผิดพลาดพร้อมที่อยู่ของไฟล์นั้น",
        "คุณสามารถกำหนดรหัสอักขระของข้อความได้ด้วยอาร์กิวเมนต์ที่สอง",
        "ค่าเริ่มต้นขึ้นอยู่กับระบบปฏิบัติการที่ผู้ใช้เลือก",
        "เมื่ออ่านข้อมูลที่ต้องการเสร็จแล้ว อย่าลืมปิดไฟล์ทุกครั้ง",
        "ไฟล์ขนาดใหญ่ควรอ่านทีละบรรทัดเพื่อประหยัดหน่วยความจำ",
        "บรรทัดว่างจะยังคงอยู่ และผู้เรียกใช้เป็นคนตัดสินใจเอง",
        "ลำดับของผลลัพธ์จะตรงกับลำดับที่เก็บไว้ในดิสก์",
        "ระหว่างการทำงานจะไม่มีการเขียนข้อมูลใด ๆ ลงดิสก์",
        "หลายโปรแกรมอาจอ่านข้อมูลชุดเดียวกันพร้อมกันได้",
    ),
    "ar": (
        "تفتح هذه الدالة الملف وتعيد قائمة تضم كل السطور.",
        "إذا لم يوجد الملف فإنها ترفع خطأ يذكر المسار.",
        "يمكن تحديد ترميز النص عن طريق المعامل الثاني.",
        "القيمة الافتراضية هي ما يفضله نظام المستخدم.",
        "لا تنس إغلاق الملف بعد قراءة ما تحتاج إليه.",
        "من الأفضل قراءة الملفات الكبيرة سطرا بعد سطر لتوفير الذاكرة.",
        "تبقى السطور الفارغة كما هي ويقرر المستدعي ما يفعله بها.",
        "ترتيب النتائج هو نفسه الترتيب الموجود على القرص.",
        "لا يكتب أي شيء على القرص في أثناء التشغيل.",
        "يمكن أن تقرأ عدة برامج البيانات نفسها في الوقت ذاته.",
    ),
    "ru": (
        "Эта функция открывает файл и возвращает список всех его строк.",
        "Если файл не найден, она сообщает об ошибке и называет путь.",
        "Вторым аргументом можно задать кодировку текста.",
        "По умолчанию берётся та, которую использует система пользователя.",
        "Не забудьте закрыть его, когда всё нужное прочитано.",
        "Большие данные лучше читать по строкам, чтобы не тратить память.",
        "Пустые строки сохраняются, и решение о них принимает вызывающий код.",
        "Порядок результатов тот же, что и на диске.",
        "Во время работы на диск ничего не записывается.",
        "Несколько программ могут читать одни и те же данные одновременно.",
    ),
}


def responses(language: str, count: int) -> list[str]:
    """Return `count` distinct responses of nine sentences in two paragraphs."""
    rng = random.Random(7)
    end = " " if language not in ("zh", "ja") else ""
    result: list[str] = []
    while len(result) < count:
        sentences = rng.sample(SENTENCES[language], 9)
        response = end.join(sentences[:4]) + "\n\n" + end.join(sentences[4:])
        if response not in result:
            result.append(response)
    return result
